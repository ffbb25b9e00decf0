{{/* Nothing of a Job's spec can be changed: its name holds a hash of it, so that another export is another Job. */}}
{{- define "snugfit.exporterName" -}}
{{- printf "%s-export-%s" (include "snugfit.fullname" .) (include "snugfit.exporterSpec" . | sha256sum | trunc 8) }}
{{- end }}

{{- define "snugfit.exporterSpec" -}}
backoffLimit: {{ .Values.exporter.backoffLimit }}
{{- with .Values.exporter.activeDeadlineSeconds }}
activeDeadlineSeconds: {{ int . }}
{{- end }}
{{- with .Values.exporter.ttlSecondsAfterFinished }}
ttlSecondsAfterFinished: {{ int . }}
{{- end }}
# 2 usage, 42 bad input, 43 does not fit, 44 another export is there, 45 verification failed: no retry mends
# them. 75 and 143 count towards backoffLimit: ignored, they would be tried for ever, and every pod be kept.
podFailurePolicy:
  rules:
    - action: FailJob
      onExitCodes: {containerName: export, operator: In, values: [2, 42, 43, 44, 45]}
    - action: Ignore
      # Before 1.35 the status has to be there.
      onPodConditions: [{type: DisruptionTarget, status: "True"}]
template:
  metadata:
    labels: {{- merge (include "snugfit.selector" (list . "exporter") | fromYaml) (default dict .Values.exporter.podLabels) | toYaml | nindent 6 }}
    {{- $own := dict "checksum/config" (include "snugfit.toml" .Values.exporter.spec | sha256sum) }}
    annotations: {{- merge $own (default dict .Values.exporter.podAnnotations) | toYaml | nindent 6 }}
  spec: {{- include "snugfit.exporterPod" . | nindent 4 }}
{{- end }}

{{- define "snugfit.exporterPod" -}}
{{- $image := ternary .Values.exporterImage .Values.image (ne .Values.exporterImage.repository "") -}}
{{ include "snugfit.podBasics" . }}
restartPolicy: Never
{{- with .Values.exporter.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
terminationGracePeriodSeconds: 60
containers:
  - name: export
    image: {{ include "snugfit.image" (list . $image) | quote }}
    imagePullPolicy: {{ $image.pullPolicy }}
    securityContext: {{- toYaml .Values.securityContext | nindent 6 }}
    args: [export, --config, /etc/snugfit/export.toml]
    env:
      # On the volume, so that a second try finds what the first has downloaded, and goes on.
      - {name: HF_HOME, value: /models/.huggingface}
      {{- with .Values.exporter.extraEnv }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    resources: {{- toYaml (default dict .Values.exporter.resources) | nindent 6 }}
    volumeMounts:
      - {name: tmp, mountPath: /tmp}
      - {name: config, mountPath: /etc/snugfit, readOnly: true}
      - {name: models, mountPath: /models}
      {{- with .Values.exporter.extraVolumeMounts }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
volumes:
  - name: tmp
    emptyDir: {}
  - name: config
    configMap: {name: {{ include "snugfit.fullname" . }}-export}
  - {{ include "snugfit.modelsVolume" . | nindent 4 | trim }}
  {{- with .Values.exporter.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with default .Values.nodeSelector .Values.exporter.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with default .Values.tolerations .Values.exporter.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- if and (eq .Values.persistence.accessMode "ReadWriteOnce") (ne (include "snugfit.mostReplicas" .) "0") }}
# One node has the volume: the exporter goes where the service's pod waits for it.
affinity:
  podAffinity:
    requiredDuringSchedulingIgnoredDuringExecution:
      - topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels: {{- include "snugfit.selector" (list . "service") | nindent 12 }}
{{- end }}
{{- end }}
