{{/* Names and labels */}}

{{- define "snugfit.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimAll "-." }}
{{- end }}

{{/* 40 letters, so that a suffix fits into the 63 of a label. */}}
{{- define "snugfit.fullname" -}}
{{- $name := include "snugfit.name" . }}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) }}
{{- default $full .Values.fullnameOverride | trunc 40 | trimAll "-." }}
{{- end }}

{{/* Takes (list ROOT COMPONENT). */}}
{{- define "snugfit.selector" -}}
{{- $ := first . -}}
app.kubernetes.io/name: {{ include "snugfit.name" $ | quote }}
app.kubernetes.io/instance: {{ $.Release.Name | quote }}
app.kubernetes.io/component: {{ last . }}
{{- end }}

{{- define "snugfit.labels" -}}
{{- $ := first . -}}
{{ include "snugfit.selector" . }}
app.kubernetes.io/version: {{ $.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $.Chart.Name $.Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "snugfit.serviceAccountName" -}}
{{- $made := ternary (include "snugfit.fullname" .) "default" .Values.serviceAccount.create }}
{{- default $made .Values.serviceAccount.name }}
{{- end }}

{{- define "snugfit.keysSecret" -}}
{{- $made := ternary (printf "%s-keys" (include "snugfit.fullname" .)) "" (not (empty .Values.apiKeys.values)) }}
{{- default $made .Values.apiKeys.existingSecret }}
{{- end }}

{{- define "snugfit.claim" -}}
{{- default (printf "%s-models" (include "snugfit.fullname" .)) .Values.persistence.existingClaim }}
{{- end }}

{{/* Takes (list ROOT IMAGE). */}}
{{- define "snugfit.image" -}}
{{- $ := first . }}{{ $image := last . }}
{{- if $image.digest }}{{ $image.repository }}@{{ $image.digest }}
{{- else }}{{ $image.repository }}:{{ default $.Chart.AppVersion $image.tag }}
{{- end }}
{{- end }}

{{/* Where config.model lies on what is mounted at /models: its path; empty elsewhere. */}}
{{- define "snugfit.onVolume" -}}
{{- $path := default "" .Values.config.model | clean }}
{{- if regexMatch "^/models(/|$)" $path }}{{ $path }}{{ end }}
{{- end }}

{{/* Numbers */}}

{{/* A quantity of Kubernetes as a number: "1Gi", 1073741824. */}}
{{- define "snugfit.number" -}}
{{- $units := dict "" 1 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15
      "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "Pi" 1125899906842624 }}
{{- if kindIs "string" . }}{{ mulf (regexFind "^[0-9.]+" . | float64) (get $units (regexFind "[a-zA-Z]*$" .)) }}
{{- else }}{{ . }}{{ end }}
{{- end }}

{{/* A duration of Prometheus as milliseconds: "15s". */}}
{{- define "snugfit.milliseconds" -}}
{{- $units := dict "ms" 1 "s" 1000 "m" 60000 "h" 3600000 }}
{{- mul (regexFind "^[0-9]+" . | atoi) (get $units (regexFind "[a-z]+$" .)) }}
{{- end }}

{{- define "snugfit.mostReplicas" -}}
{{- ternary .Values.autoscaling.maxReplicas .Values.replicaCount .Values.autoscaling.enabled | int }}
{{- end }}

{{/* 15 s for the engine to stop and the last frames to be sent. */}}
{{- define "snugfit.graceSeconds" -}}
{{- add .Values.drain.delaySeconds (ceil .Values.config.drain_seconds | int) 15 }}
{{- end }}

{{/* A Deployment is called stuck when nothing happens for longer than ending, an export that is waited for (a day,
     where nothing limits it), loading and ten minutes take. */}}
{{- define "snugfit.progressSeconds" -}}
{{- $probe := .Values.startupProbe }}
{{- $loading := mul $probe.periodSeconds $probe.failureThreshold | add (default 0 $probe.initialDelaySeconds) }}
{{- $export := ternary (default 86400 .Values.exporter.activeDeadlineSeconds) 0 .Values.exporter.enabled | int }}
{{- add $loading $export (include "snugfit.graceSeconds" .) 600 }}
{{- end }}

{{/* Configuration files */}}

{{/* A map as TOML. Whole numbers arrive as floats, which Helm 3 and Helm 4 would write differently. */}}
{{- define "snugfit.toml" -}}
{{- $values := default dict . | deepCopy }}
{{- include "snugfit.whole" $values }}
{{- toToml $values | trim }}
{{- end }}

{{/* Makes whole numbers of a map, and of maps in it, integers. It prints nothing. */}}
{{- define "snugfit.whole" -}}
{{- range $key, $value := . }}
{{- if kindIs "float64" $value }}{{ if eq $value (floor $value) }}{{ $_ := set $ $key (int64 $value) }}{{ end }}
{{- else if kindIs "map" $value }}{{ include "snugfit.whole" $value }}{{ end }}
{{- end }}
{{- end }}

{{/* YAML takes on and off, which some settings are, for true and false, which none is. */}}
{{- define "snugfit.config" -}}
{{- $config := dict }}
{{- range $key, $value := .Values.config }}
{{- if kindIs "bool" $value }}{{ $value = ternary "on" "off" $value }}{{ end }}
{{- $_ := set $config $key $value }}
{{- end }}
{{- if include "snugfit.keysSecret" . }}
{{- $_ := set $config "api_key_file" "/etc/snugfit/keys/api-keys" }}
{{- end }}
{{- include "snugfit.toml" $config }}
{{- end }}

{{/* Parts of pods */}}

{{- define "snugfit.podBasics" -}}
serviceAccountName: {{ include "snugfit.serviceAccountName" . | quote }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext: {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* `resources`, and the GPUs of `gpu.count`. */}}
{{- define "snugfit.resources" -}}
{{- $resources := default dict .Values.resources | deepCopy }}
{{- if .Values.gpu.count }}
{{- $gpus := dict .Values.gpu.resource (int .Values.gpu.count) }}
{{- $resources = merge (dict "requests" $gpus "limits" (deepCopy $gpus)) $resources }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{/* "true" where a pod asks for a GPU: by `gpu.count`, or in `resources`, by whatever name it has there. */}}
{{- define "snugfit.asksForGpu" -}}
{{- $resources := default dict .Values.resources }}
{{- $gpus := ternary (list .Values.gpu.resource) list (gt (int .Values.gpu.count) 0) }}
{{- range $name, $count := merge dict (dig "limits" dict $resources) (dig "requests" dict $resources) }}
{{- $isGpu := or (eq $name $.Values.gpu.resource) (regexMatch "gpu|nvidia" $name) }}
{{- if and $isGpu (gt (include "snugfit.number" $count | float64) 0.0) }}{{ $gpus = append $gpus $name }}{{ end }}
{{- end }}
{{- if $gpus }}true{{ end }}
{{- end }}

{{/* The places that config.max_memory limits: "0 cpu". It is a text or a table. */}}
{{- define "snugfit.limitedPlaces" -}}
{{- $limits := default dict .Values.config.max_memory }}
{{- if kindIs "map" $limits }}{{ keys $limits | sortAlpha | join " " }}
{{- else }}{{ regexReplaceAll " *=[^,]*(, *|$)" (toString $limits) " " | trim }}{{ end }}
{{- end }}

{{- define "snugfit.modelsVolume" -}}
name: models
{{- if eq .Values.model.source "image" }}
image:
  reference: {{ .Values.model.image.reference | quote }}
  pullPolicy: {{ .Values.model.image.pullPolicy }}
{{- else }}
persistentVolumeClaim:
  claimName: {{ include "snugfit.claim" . | quote }}
  {{- if eq .Values.persistence.accessMode "ReadOnlyMany" }}
  readOnly: true
  {{- end }}
{{- end }}
{{- end }}

{{/* With a labelSelector where one has none. */}}
{{- define "snugfit.spread" -}}
{{- $selector := dict "matchLabels" (include "snugfit.selector" (list . "service") | fromYaml) }}
{{- $spread := list }}
{{- range .Values.topologySpreadConstraints }}
{{- $spread = append $spread (hasKey . "labelSelector" | ternary . (set (deepCopy .) "labelSelector" $selector)) }}
{{- end }}
{{- toYaml $spread }}
{{- end }}

{{/* "true" where `config.model` or what the exporter is given comes from the hub. Takes a list of sources. */}}
{{- define "snugfit.fromHub" -}}
{{- range . }}{{ if and . (not (regexMatch "^[/.~]" .)) }}true{{ end }}{{ end }}
{{- end }}
