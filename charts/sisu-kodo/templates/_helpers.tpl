{{/* Labels of every object of the release. */}}
{{- define "sisu-kodo.labels" -}}
app.kubernetes.io/name: sisu-kodo
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{/* The rules of one Role from rows of files/rbac.yaml. */}}
{{- define "sisu-kodo.rules" -}}
{{- range . }}
- apiGroups: [{{ .apiGroup | quote }}]
  resources: [{{ .resource | quote }}]
  verbs: {{ keys .verbs | sortAlpha | toJson }}
{{- end }}
{{- end }}
