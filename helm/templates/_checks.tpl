{{/* What the schema cannot say: values that are right alone and wrong together. All of them are told at once. */}}
{{- define "snugfit.checks" -}}
{{- $problems := concat
      (include "snugfit.checks.names" . | fromJsonArray)
      (include "snugfit.checks.images" . | fromJsonArray)
      (include "snugfit.checks.gpu" . | fromJsonArray)
      (include "snugfit.checks.model" . | fromJsonArray)
      (include "snugfit.checks.volume" . | fromJsonArray)
      (include "snugfit.checks.exporter" . | fromJsonArray)
      (include "snugfit.checks.other" . | fromJsonArray) }}
{{- if $problems }}{{ fail (printf "\n\n- %s\n" (join "\n- " $problems)) }}{{ end }}
{{- end }}

{{/* A Service's name has no dot and a letter first; a release's may be otherwise. */}}
{{- define "snugfit.checks.names" -}}
{{- $problems := list }}
{{- $name := include "snugfit.fullname" . }}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) }}
{{- $problems = append $problems (printf "the Service would be called %s, and its name has a letter first, and then letters, digits and -: set fullnameOverride, or give the release another name." $name) }}
{{- end }}
{{- toJson $problems }}
{{- end }}

{{/* A registry may have a port: only what follows the last / is looked at for a tag. */}}
{{- define "snugfit.checks.images" -}}
{{- $problems := list }}
{{- range list "image" "exporterImage" }}
{{- $repository := get (get $.Values .) "repository" }}
{{- if contains "@" $repository }}
{{- $problems = append $problems (printf "%s.repository is %s: put what follows the @ in %s.digest." . $repository .) }}
{{- else if regexMatch ":[^/]*$" $repository }}
{{- $problems = append $problems (printf "%s.repository is %s: put the tag in %s.tag." . $repository .) }}
{{- end }}
{{- end }}
{{- with .Values.exporterImage }}
{{- if and (not .repository) (or .tag .digest) }}
{{- $problems = append $problems "exporterImage has a tag or a digest and no repository, and would not be used: set exporterImage.repository too. Without all three the exporter runs in the service's image." }}
{{- end }}
{{- end }}
{{- toJson $problems }}
{{- end }}

{{- define "snugfit.checks.gpu" -}}
{{- $problems := list }}
{{- $places := include "snugfit.limitedPlaces" . }}{{ $device := default "" .Values.config.device | toString }}
{{- if eq (include "snugfit.mostReplicas" .) "0" }}
{{- else if include "snugfit.asksForGpu" . }}
{{- if or (eq $device "cpu") (and $places (not (regexMatch "[0-9]" $places))) }}
{{- $why := ternary "config.device is cpu" (printf "config.max_memory names only %s" $places) (eq $device "cpu") }}
{{- $problems = append $problems (printf "a GPU is asked for, and %s, so that it would be idle: plan with --gpu, or take the GPU out of gpu.count and resources." $why) }}
{{- end }}
{{- with dig "limits" "memory" "" (default dict .Values.resources) }}
{{- if lt (include "snugfit.number" . | float64) 2147483648.0 }}
{{- $problems = append $problems (printf "a GPU is asked for, and resources.limits.memory is %v: CUDA keeps 1.5Gi on the host beside the process itself. Take the `resources` that `snugfit plan MODEL --gpu SIZE --helm-values` prints; no model takes less than 2Gi." .) }}
{{- end }}
{{- end }}
{{- else }}
{{- $wants := list }}
{{- if .Values.gpu.runtimeClassName }}{{ $wants = append $wants "gpu.runtimeClassName is set" }}{{ end }}
{{- if hasPrefix "cuda" $device }}{{ $wants = append $wants (printf "config.device is %s" $device) }}{{ end }}
{{- if regexMatch "[0-9]" $places }}{{ $wants = append $wants "config.max_memory names one" }}{{ end }}
{{- range $wants }}
{{- $problems = append $problems (printf "no GPU is asked for, and %s: plan with --gpu, or set gpu.count." .) }}
{{- end }}
{{- end }}
{{- toJson $problems }}
{{- end }}

{{- define "snugfit.checks.model" -}}
{{- $problems := list }}
{{- $source := .Values.model.source }}{{ $model := default "" .Values.config.model }}
{{- $onVolume := ne (include "snugfit.onVolume" .) "" }}
{{- if and $onVolume (eq $source "none") }}
{{- $problems = append $problems (printf "config.model is %s, and nothing is mounted at /models: set model.source to pvc or image." $model) }}
{{- end }}
{{- if and (eq $source "pvc") .Values.persistence.readOnly (not $onVolume) (ne (include "snugfit.mostReplicas" .) "0") }}
{{- $problems = append $problems (printf "model.source is pvc, and config.model (%s) is not below /models: give its path there, or persistence.readOnly: false to keep a model of the hub on the volume." (default "not set" $model)) }}
{{- end }}
{{- if eq $source "image" }}
{{- if not .Values.model.image.reference }}
{{- $problems = append $problems "model.source is image: set model.image.reference." }}
{{- end }}
{{- if not $onVolume }}
{{- $problems = append $problems "model.source is image: set config.model to /models, where the image is mounted." }}
{{- end }}
{{- if semverCompare "<1.35-0" .Capabilities.KubeVersion.Version }}
{{- $problems = append $problems (printf "model.source is image: image volumes are on from Kubernetes 1.35; this is %s." .Capabilities.KubeVersion.Version) }}
{{- end }}
{{- end }}
{{- toJson $problems }}
{{- end }}

{{- define "snugfit.checks.volume" -}}
{{- $problems := list }}
{{- $mode := .Values.persistence.accessMode }}{{ $most := include "snugfit.mostReplicas" . | int }}
{{- if eq .Values.model.source "pvc" }}
{{- if hasPrefix "ReadWriteOnce" $mode }}
{{- if gt $most 1 }}
{{- $problems = append $problems (printf "%d replicas cannot share a %s volume: pods on other nodes would wait for it for ever. Use a storage class with ReadWriteMany, or ReadOnlyMany once the model is exported (docs/kubernetes.md), or model.source: image, or one replica." $most $mode) }}
{{- end }}
{{- if .Values.rollout.spare }}
{{- $problems = append $problems (printf "rollout.spare with a %s volume: the new pod cannot have the volume while the old one has it. Set rollout.spare: false." $mode) }}
{{- end }}
{{- end }}
{{- if and (eq $mode "ReadOnlyMany") (not .Values.persistence.readOnly) }}
{{- $problems = append $problems "persistence.readOnly: false with a ReadOnlyMany volume: nothing can be written to it." }}
{{- end }}
{{- if and (eq $mode "ReadOnlyMany") (not .Values.persistence.existingClaim) (not .Values.persistence.dataSource) }}
{{- $problems = append $problems "a new ReadOnlyMany volume would be empty for ever: name persistence.existingClaim, or persistence.dataSource to fill it from." }}
{{- end }}
{{- with .Values.persistence.dataSource }}
{{- if and (ne (default "PersistentVolumeClaim" .kind) "PersistentVolumeClaim") (not .apiGroup) }}
{{- $problems = append $problems (printf "persistence.dataSource is a %s without an apiGroup, and only a PersistentVolumeClaim has none: a VolumeSnapshot is of apiGroup snapshot.storage.k8s.io." .kind) }}
{{- end }}
{{- end }}
{{- else }}
{{- range list "existingClaim" "storageClass" "dataSource" }}
{{- if get $.Values.persistence . }}
{{- $problems = append $problems (printf "persistence.%s is set, and persistence is only used with model.source: pvc; it is %s." . $.Values.model.source) }}
{{- end }}
{{- end }}
{{- if not .Values.persistence.readOnly }}
{{- $problems = append $problems (printf "persistence.readOnly is false, and persistence is only used with model.source: pvc; it is %s." .Values.model.source) }}
{{- end }}
{{- end }}
{{- toJson $problems }}
{{- end }}

{{- define "snugfit.checks.exporter" -}}
{{- $problems := list }}
{{- if .Values.exporter.enabled }}
{{- $mode := .Values.persistence.accessMode }}{{ $most := include "snugfit.mostReplicas" . | int }}
{{- $out := default "" .Values.exporter.spec.out }}
{{- if ne .Values.model.source "pvc" }}
{{- $problems = append $problems "exporter.enabled needs a volume to write to: set model.source to pvc." }}
{{- end }}
{{- if eq $mode "ReadOnlyMany" }}
{{- $problems = append $problems "exporter.enabled with a ReadOnlyMany volume: nothing can be written to it. Export onto another volume first (docs/kubernetes.md)." }}
{{- end }}
{{- if and (eq $mode "ReadWriteOncePod") (gt $most 0) }}
{{- $problems = append $problems "exporter.enabled with a ReadWriteOncePod volume: exporter and service cannot have it at once. Use ReadWriteOnce, or replicaCount: 0 until the export is done." }}
{{- end }}
{{- if and (eq $mode "ReadWriteOnce") (gt $most 0) }}
{{- range list "nodeSelector" "tolerations" }}
{{- if and (get $.Values.exporter .) (ne (toJson (get $.Values.exporter .)) (toJson (get $.Values .))) }}
{{- $problems = append $problems (printf "exporter.%s is not that of the service, and on a ReadWriteOnce volume both have to be on one node: the exporter would wait for ever. Leave it out, or set replicaCount: 0 until the export is done." .) }}
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.exporter.spec.oci }}
{{- if not (regexMatch "^/models/." (clean .)) }}
{{- $problems = append $problems (printf "exporter.spec.oci is %q: it has to be a folder below /models, where the volume is." .) }}
{{- end }}
{{- end }}
{{- $problems = concat $problems (include "snugfit.checks.env" (list "exporter.extraEnv" .Values.exporter.extraEnv (list "HF_HOME")) | fromJsonArray) }}
{{- if not .Values.exporter.spec.base }}
{{- $problems = append $problems "exporter.enabled: set exporter.spec.base to the model to export." }}
{{- end }}
{{- if not (regexMatch "^/models/." (clean $out)) }}
{{- $problems = append $problems (printf "exporter.spec.out is %q: it has to be a folder below /models, such as /models/merged." $out) }}
{{- else if and (gt $most 0) (ne (clean $out) (default "" .Values.config.model | clean)) }}
{{- $problems = append $problems (printf "config.model is %q and exporter.spec.out %q: the service serves what is exported, so they are the same." (default "" .Values.config.model) $out) }}
{{- end }}
{{- end }}
{{- toJson $problems }}
{{- end }}

{{/* Takes (list PATH VARIABLES OWN): variables that are among the chart's own would be there twice. */}}
{{- define "snugfit.checks.env" -}}
{{- $problems := list }}
{{- range index . 1 }}
{{- if has .name (last $) }}
{{- $problems = append $problems (printf "%s sets %s, which the chart sets itself: take it out." (first $) .name) }}
{{- end }}
{{- end }}
{{- toJson $problems }}
{{- end }}

{{/* Over the file the environment wins, and the chart knows only what stands in the file. A key alone may come from a
     Secret this way. */}}
{{- define "snugfit.checks.settings" -}}
{{- $problems := list }}
{{- range .Values.extraEnv }}
{{- $name := default "" .name | toString | upper }}
{{- if eq $name "SNUGFIT_CONFIG" }}
{{- $problems = append $problems "extraEnv sets SNUGFIT_CONFIG, which the chart sets itself: take it out." }}
{{- else if and (hasPrefix "SNUGFIT_" $name) (ne $name "SNUGFIT_API_KEY") }}
{{- $problems = append $problems (printf "extraEnv sets %s, which would win over what the chart reads in config: take it out, and set config.%s." .name (trimPrefix "SNUGFIT_" $name | lower)) }}
{{- end }}
{{- end }}
{{- toJson $problems }}
{{- end }}

{{/* Takes (list PATH RESOURCES). */}}
{{- define "snugfit.checks.resources" -}}
{{- $problems := list }}
{{- $limits := dig "limits" dict (last . | default dict) }}
{{- range $name, $request := dig "requests" dict (last . | default dict) }}
{{- $limit := get $limits $name }}
{{- if and $limit (gt (include "snugfit.number" $request | float64) (include "snugfit.number" $limit | float64)) }}
{{- $problems = append $problems (printf "%s.requests.%s is %v, above the limit of %v: set %s.limits.%s too." (first $) $name $request $limit (first $) $name) }}
{{- end }}
{{- end }}
{{- toJson $problems }}
{{- end }}

{{- define "snugfit.checks.other" -}}
{{- $own := ternary (list "HF_HOME") list (and (eq .Values.model.source "pvc") (not .Values.persistence.readOnly)) }}
{{- $problems := concat
      (include "snugfit.checks.env" (list "extraEnv" .Values.extraEnv $own) | fromJsonArray)
      (include "snugfit.checks.settings" . | fromJsonArray)
      (include "snugfit.checks.resources" (list "resources" .Values.resources) | fromJsonArray)
      (include "snugfit.checks.resources" (list "exporter.resources" .Values.exporter.resources) | fromJsonArray) }}
{{- if regexMatch "^(127\\.|localhost$|::1$)" .Values.config.host }}
{{- $problems = append $problems (printf "config.host is %s: neither the probes nor the Service reach it there. 0.0.0.0 is every address of the pod." .Values.config.host) }}
{{- end }}
{{- if .Values.config.api_key }}
{{- $problems = append $problems "config.api_key would stand in a ConfigMap for everyone to read: use apiKeys." }}
{{- end }}
{{- if and .Values.config.budget .Values.config.max_memory }}
{{- $problems = append $problems "config.budget and config.max_memory: give one of them. `snugfit plan --helm-values` prints max_memory, which is what it planned with." }}
{{- end }}
{{- if and .Values.apiKeys.existingSecret .Values.apiKeys.values }}
{{- $problems = append $problems "apiKeys.existingSecret and apiKeys.values: give one of them." }}
{{- end }}
{{- if and .Values.config.api_key_file (include "snugfit.keysSecret" .) }}
{{- $problems = append $problems "config.api_key_file and apiKeys: give one of them." }}
{{- end }}
{{- $resources := default dict .Values.resources }}
{{- $planned := dig "limits" .Values.gpu.resource 0 $resources | int }}
{{- if and .Values.gpu.count $planned (ne (int .Values.gpu.count) $planned) }}
{{- $problems = append $problems (printf "gpu.count is %d and resources.limits say %d %s: leave gpu.count 0 with a plan's values." (int .Values.gpu.count) $planned .Values.gpu.resource) }}
{{- end }}
{{- if and (ne .Values.gpu.resource "nvidia.com/gpu") (dig "limits" "nvidia.com/gpu" 0 $resources) }}
{{- $problems = append $problems (printf "gpu.resource is %s, and resources ask for nvidia.com/gpu as a plan does: the pod would have to have that. Take nvidia.com/gpu out of resources, and set gpu.count." .Values.gpu.resource) }}
{{- end }}
{{- if .Values.autoscaling.enabled }}
{{- if gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas) }}
{{- $problems = append $problems "autoscaling.minReplicas is above autoscaling.maxReplicas." }}
{{- end }}
{{- if and (eq .Values.autoscaling.kind "keda") (not .Values.serviceMonitor.enabled) }}
{{- range ternary (list "query" "runningQuery") (list "query") (gt (int .Values.autoscaling.runningPerReplica) 0) }}
{{- if not (get $.Values.autoscaling.keda .) }}
{{- $problems = append $problems (printf "autoscaling.kind is keda: without serviceMonitor.enabled nobody knows how Prometheus labels this release. Enable it, or set autoscaling.keda.%s." .) }}
{{- end }}
{{- end }}
{{- end }}
{{- if and (eq .Values.autoscaling.kind "keda") (not .Values.autoscaling.keda.serverAddress) }}
{{- $problems = append $problems "autoscaling.kind is keda: set autoscaling.keda.serverAddress to Prometheus, such as http://prometheus.monitoring:9090." }}
{{- end }}
{{- end }}
{{- with .Values.serviceMonitor }}
{{- if and .scrapeTimeout (gt (include "snugfit.milliseconds" .scrapeTimeout | int) (include "snugfit.milliseconds" .interval | int)) }}
{{- $problems = append $problems (printf "serviceMonitor.scrapeTimeout (%s) is above serviceMonitor.interval (%s): Prometheus would refuse it. Leave scrapeTimeout empty." .scrapeTimeout .interval) }}
{{- end }}
{{- end }}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) }}
{{- $problems = append $problems "ingress.enabled: name the ingress.hosts." }}
{{- end }}
{{- if and .Values.gateway.enabled (not .Values.gateway.parentRefs) }}
{{- $problems = append $problems "gateway.enabled: name the Gateway in gateway.parentRefs." }}
{{- end }}
{{- toJson $problems }}
{{- end }}
