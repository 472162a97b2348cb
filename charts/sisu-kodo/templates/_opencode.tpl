{{/* "true" where the worker has a daemon of its own beside it: live or record, and none elsewhere. */}}
{{- define "sisu-kodo.sidecar" -}}
{{- if and .Values.controller.enabled (has .Values.opencode.mode (list "live" "record")) (not .Values.opencode.baseUrl) }}true{{ end -}}
{{- end }}

{{/* The daemon's password, for both who need it: from the given Secret, or the one of opencode.yaml. */}}
{{- define "sisu-kodo.opencodePassword" -}}
{{- $secret := .Values.opencode.existingSecret | default (ternary "sisu-kodo-opencode" "" (eq (include "sisu-kodo.sidecar" .) "true")) }}
{{- if $secret -}}
- name: OPENCODE_SERVER_PASSWORD
  valueFrom:
    secretKeyRef: {name: {{ $secret | quote }}, key: {{ .Values.opencode.passwordKey | quote }}}
{{- end }}
{{- end }}

{{/* The side-car. It has the provider's key and no other secret than its password: neither a database nor a token. */}}
{{- define "sisu-kodo.opencode" -}}
{{- $o := .Values.opencode -}}
- name: opencode
  image: {{ include "sisu-kodo.image" . | quote }}
  imagePullPolicy: {{ .Values.controller.image.pullPolicy }}
  args: [oc-daemon]
  securityContext:
    {{- include "sisu-kodo.containerSecurityContext" . | nindent 4 }}
  env:
    - {name: OC_MODEL, value: {{ $o.model | quote }}}
    - {name: OC_MODEL_BASE_URL, value: {{ $o.modelBaseUrl | quote }}}
    {{- if $o.modelSecret }}
    - name: OC_MODEL_API_KEY
      valueFrom:
        secretKeyRef: {name: {{ $o.modelSecret | quote }}, key: {{ $o.modelSecretKey | quote }}}
    {{- end }}
    {{- include "sisu-kodo.opencodePassword" . | nindent 4 }}
    - {name: OC_SERVER_PORT, value: {{ $o.port | quote }}}
    - {name: OC_STATE, value: /var/lib/sisu-kodo/opencode}
    - {name: OC_STALL_MS, value: {{ $o.stallMs | quote }}}
    - {name: OC_MEMORY_MB, value: {{ $o.memoryMB | int64 | quote }}}
    - {name: LOG_FORMAT, value: {{ .Values.controller.log.format | quote }}}
    - {name: LOG_LEVEL, value: {{ .Values.controller.log.level | quote }}}
    {{- include "sisu-kodo.networkEnv" . | nindent 4 }}
  # The daemon listens on the Pod's loopback, where a kubelet cannot ask. The supervisor touches this file at each healthy answer;
  # it restarts the daemon itself, so the container is restarted only when that has not helped for five minutes.
  startupProbe:
    {{- include "sisu-kodo.opencodeProbe" 30 | nindent 4 }}
    periodSeconds: 2
    timeoutSeconds: 5
    failureThreshold: 90
  readinessProbe:
    {{- include "sisu-kodo.opencodeProbe" 30 | nindent 4 }}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 1
  livenessProbe:
    {{- include "sisu-kodo.opencodeProbe" 300 | nindent 4 }}
    periodSeconds: 30
    timeoutSeconds: 5
    failureThreshold: 2
  resources:
    {{- toYaml $o.resources | nindent 4 }}
  volumeMounts:
    - {name: opencode, mountPath: /var/lib/sisu-kodo/opencode}
    - {name: opencode-tmp, mountPath: /tmp}
    {{- if .Values.network.caConfigMap }}
    - {name: ca, mountPath: /etc/sisu-kodo/ca, readOnly: true}
    {{- end }}
{{- end }}

{{/* Healthy within so many seconds. */}}
{{- define "sisu-kodo.opencodeProbe" -}}
exec:
  command:
    - python
    - -S
    - -c
    - import os, sys, time; sys.exit(time.time() - os.stat("/var/lib/sisu-kodo/opencode/healthy").st_mtime > {{ . }})
{{- end }}

{{/* The port of a URL, by its scheme where it has none. */}}
{{- define "sisu-kodo.port" -}}
{{- $url := urlParse . -}}
{{- regexFind "[0-9]+$" (regexFind ":[0-9]+$" $url.host) | default (ternary "80" "443" (eq $url.scheme "http")) -}}
{{- end }}
