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

{{/* What Services and Deployments find Pods by, with app.kubernetes.io/component: controller or worker. */}}
{{- define "sisu-kodo.selector" -}}
app.kubernetes.io/name: sisu-kodo
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "sisu-kodo.image" -}}
{{- with .Values.controller.image -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ end -}}
{{- end -}}
{{- end }}

{{/* Pod Security "restricted", and a root file system that nothing can write to. */}}
{{- define "sisu-kodo.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "sisu-kodo.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* One environment variable from a key of the database's Secret: (dict "name" … "key" … "root" $). */}}
{{- define "sisu-kodo.databaseEnv" -}}
- name: {{ .name }}
  valueFrom:
    secretKeyRef: {name: {{ .root.Values.database.existingSecret | quote }}, key: {{ .key | quote }}}
{{- end }}

{{/* Settings of one process, by the names of controller/config.py: (dict "role" … "root" $). */}}
{{- define "sisu-kodo.env" -}}
{{- $v := .root.Values -}}
{{- $c := $v.controller -}}
- {name: RANDOM_SEED, value: {{ $c.randomSeed | quote }}}
- {name: OC_MODE, value: {{ $v.opencode.mode | quote }}}
- {name: OC_SERVER_PORT, value: {{ $v.opencode.port | quote }}}
{{- with $v.opencode.baseUrl }}
- {name: OC_BASE_URL, value: {{ . | quote }}}
{{- end }}
{{- with $v.opencode.fixtures | default (ternary "/var/lib/sisu-kodo/turns" "" (eq $v.opencode.mode "record")) }}
- {name: OC_FIXTURES, value: {{ . | quote }}}
{{- end }}
{{- if and $v.opencode.model (ne .role "controller") }}
- {name: OC_MODEL, value: {{ $v.opencode.model | quote }}}
{{- end }}
{{- if ne .role "controller" }}
{{ include "sisu-kodo.opencodePassword" .root }}
{{- end }}
- {name: SBX_MODE, value: {{ $v.sandbox.mode | quote }}}
- {name: SBX_PROVIDER, value: {{ $v.sandbox.provider | quote }}}
{{- if ne .role "controller" }}
{{- include "sisu-kodo.sandboxEnv" $v.sandbox }}
{{- end }}
{{- $worker := $v.database.workerKey | default $v.database.key }}
{{ include "sisu-kodo.databaseEnv" (dict "name" "DATABASE_URL" "key" (ternary $worker $v.database.key (eq .role "worker")) "root" .root) }}
{{- if and $v.database.workerKey (eq .role "all") }}
{{ include "sisu-kodo.databaseEnv" (dict "name" "DATABASE_URL_WORKER" "key" $v.database.workerKey "root" .root) }}
{{- end }}
- {name: DBOS__APPVERSION, value: {{ $c.workflowVersion | quote }}}
- {name: ADMIN_PORT, value: {{ $c.adminPort | quote }}}
- {name: POLICY_FILE, value: /etc/sisu-kodo/policy/policy.yaml}
- {name: SERVICE_ACCOUNT, value: {{ $v.serviceAccount.name | quote }}}
- name: POD_NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- {name: WORKSPACE_ROOT, value: /var/lib/sisu-kodo/git}
{{- if $v.privateRepositories.enabled }}
- {name: WORKSPACE_SECRETS, value: "true"}
{{- end }}
- {name: LEASE_TTL_SECONDS, value: {{ $c.leaseTtlSeconds | quote }}}
- {name: RESYNC_SECONDS, value: {{ $c.resyncSeconds | quote }}}
- {name: QUEUE_POLL_SECONDS, value: {{ $c.queues.pollSeconds | quote }}}
- {name: INTENT_QUEUE_WORKER_CONCURRENCY, value: {{ $c.queues.intentConcurrency | quote }}}
- {name: SBX_QUEUE_WORKER_CONCURRENCY, value: {{ $c.queues.sandboxConcurrency | quote }}}
- {name: LOG_FORMAT, value: {{ $c.log.format | quote }}}
- {name: LOG_LEVEL, value: {{ $c.log.level | quote }}}
{{ include "sisu-kodo.networkEnv" .root }}
{{- end }}

{{/* The way out, for git and for the model's provider. */}}
{{- define "sisu-kodo.networkEnv" -}}
{{- with .Values.network }}
{{- with .httpsProxy }}
- {name: HTTPS_PROXY, value: {{ . | quote }}}
{{- end }}
{{- with .noProxy }}
- {name: NO_PROXY, value: {{ . | quote }}}
{{- end }}
{{- if .caConfigMap }}
- {name: SSL_CERT_FILE, value: {{ printf "/etc/sisu-kodo/ca/%s" .caKey | quote }}}
{{- end }}
{{- end }}
{{- end }}

{{/* One Deployment: (dict "role" all|controller|worker "name" … "replicas" … "account" … "token" bool "resources" … "root" $). */}}
{{- define "sisu-kodo.deployment" -}}
{{- $root := .root -}}
{{- $v := $root.Values -}}
{{- $c := $v.controller -}}
{{- $works := ne .role "controller" -}}
{{- /* Not the role: a selector is immutable, and `split` may be switched on later. */}}
{{- $component := ternary "worker" "controller" (eq .role "worker") }}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ .name }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- include "sisu-kodo.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ $component }}
spec:
  replicas: {{ .replicas }}
  strategy: {type: Recreate}
  revisionHistoryLimit: 3
  selector:
    matchLabels:
      {{- include "sisu-kodo.selector" $root | nindent 6 }}
      app.kubernetes.io/component: {{ $component }}
  template:
    metadata:
      labels:
        {{- with $c.podLabels }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
        {{- include "sisu-kodo.labels" $root | nindent 8 }}
        app.kubernetes.io/component: {{ $component }}
        sisukodo.dev/metrics: "true"
      annotations:
        {{- with $c.podAnnotations }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
        kubectl.kubernetes.io/default-container: controller
        # The policy is read once, at the start: a changed one rolls the Pods.
        checksum/policy: {{ toYaml $v.policy | sha256sum }}
    spec:
      serviceAccountName: {{ .account }}
      automountServiceAccountToken: {{ .token }}
      enableServiceLinks: false
      terminationGracePeriodSeconds: {{ $c.terminationGracePeriodSeconds }}
      securityContext:
        {{- include "sisu-kodo.podSecurityContext" $root | nindent 8 }}
      {{- with $c.image.pullSecrets }}
      imagePullSecrets:
        {{- range . }}
        - name: {{ . }}
        {{- end }}
      {{- end }}
      {{- with $c.priorityClassName }}
      priorityClassName: {{ . }}
      {{- end }}
      {{- with $c.nodeSelector }}
      nodeSelector:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $c.tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $c.affinity }}
      affinity:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      containers:
        - name: controller
          image: {{ include "sisu-kodo.image" $root | quote }}
          imagePullPolicy: {{ $c.image.pullPolicy }}
          args: [run, --role, {{ .role }}]
          securityContext:
            {{- include "sisu-kodo.containerSecurityContext" $root | nindent 12 }}
          env:
            {{- include "sisu-kodo.env" (dict "role" .role "root" $root) | nindent 12 }}
            {{- if and $works $c.extraEnv }}
            {{- toYaml $c.extraEnv | nindent 12 }}
            {{- end }}
          ports:
            - {name: admin, containerPort: {{ $c.adminPort }}, protocol: TCP}
          # A start waits for PostgreSQL and takes over what a dead worker left: up to two minutes before it counts as failed.
          startupProbe:
            httpGet: {path: /healthz, port: admin}
            periodSeconds: 2
            timeoutSeconds: 5
            failureThreshold: 60
          livenessProbe:
            httpGet: {path: /healthz, port: admin}
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: 3
          readinessProbe:
            httpGet: {path: /readyz, port: admin}
            periodSeconds: 5
            timeoutSeconds: 5
            failureThreshold: 2
          resources:
            {{- toYaml .resources | nindent 12 }}
          volumeMounts:
            - {name: policy, mountPath: /etc/sisu-kodo/policy, readOnly: true}
            - {name: workspace, mountPath: /var/lib/sisu-kodo}
            - {name: tmp, mountPath: /tmp}
            {{- if $v.network.caConfigMap }}
            - {name: ca, mountPath: /etc/sisu-kodo/ca, readOnly: true}
            {{- end }}
            {{- if and $works $c.extraVolumeMounts }}
            {{- toYaml $c.extraVolumeMounts | nindent 12 }}
            {{- end }}
        {{- if and $works (include "sisu-kodo.sidecar" $root) }}
        {{- include "sisu-kodo.opencode" $root | nindent 8 }}
        {{- end }}
        {{- if and $works $c.extraContainers }}
        {{- toYaml $c.extraContainers | nindent 8 }}
        {{- end }}
      volumes:
        - name: policy
          configMap: {name: sisu-kodo-policy}
        - name: workspace
          emptyDir: {sizeLimit: {{ $c.workspaceSize }}}
        - name: tmp
          emptyDir: {sizeLimit: {{ $c.tmpSize }}}
        {{- if and $works (include "sisu-kodo.sidecar" $root) }}
        - name: opencode
          emptyDir: {sizeLimit: {{ $v.opencode.stateSize }}}
        - name: opencode-tmp
          emptyDir: {sizeLimit: 64Mi}
        {{- end }}
        {{- if $v.network.caConfigMap }}
        - name: ca
          configMap: {name: {{ $v.network.caConfigMap | quote }}}
        {{- end }}
        {{- if and $works $c.extraVolumes }}
        {{- toYaml $c.extraVolumes | nindent 8 }}
        {{- end }}
{{- end }}

{{/* At most one Pod of several is evicted at a time: (dict "role" … "name" … "replicas" … "root" $). */}}
{{- define "sisu-kodo.disruptionBudget" -}}
{{- if gt (int .replicas) 1 }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ .name }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "sisu-kodo.labels" .root | nindent 4 }}
    app.kubernetes.io/component: {{ ternary "worker" "controller" (eq .role "worker") }}
spec:
  maxUnavailable: 1
  selector:
    matchLabels:
      {{- include "sisu-kodo.selector" .root | nindent 6 }}
      app.kubernetes.io/component: {{ ternary "worker" "controller" (eq .role "worker") }}
{{- end }}
{{- end }}

{{/* "true" where sandboxes are Pods, which need a namespace, rights and NetworkPolicies. */}}
{{- define "sisu-kodo.sandboxPods" -}}
{{- if and (eq .Values.sandbox.provider "kubernetes") (ne .Values.sandbox.mode "mock") }}true{{ end -}}
{{- end }}

{{/* What a worker's sandbox provider needs: limits, E2B's account, what Pods are made from. */}}
{{- define "sisu-kodo.sandboxEnv" -}}
{{- $given := dict "SBX_CREATES_PER_SECOND" .createsPerSecond "SBX_MAX_CONCURRENT" .maxConcurrent }}
{{- if eq .provider "e2b" }}
{{- $given = merge $given (dict "SBX_E2B_TEMPLATES" .e2b.templates "E2B_DOMAIN" .e2b.domain "E2B_API_URL" .e2b.apiUrl "E2B_SANDBOX_URL" .e2b.sandboxUrl) }}
{{- with .e2b.apiKeySecret }}
- name: E2B_API_KEY
  valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: {{ $.e2b.apiKeyKey | quote }}}}
{{- end }}
{{- end }}
{{- if eq .provider "kubernetes" }}
{{- with .kubernetes }}
{{- $pairs := list }}
{{- range $key, $value := .nodeSelector }}
{{- $pairs = append $pairs (printf "%s=%s" $key $value) }}
{{- end }}
{{- $given = merge $given (dict "SBX_KUBERNETES_TEMPLATES" .templates "SBX_KUBERNETES_NAMESPACE" .namespace "SBX_KUBERNETES_RUNTIME_CLASS" .runtimeClass "SBX_KUBERNETES_PULL_SECRETS" (join "," .pullSecrets) "SBX_KUBERNETES_NODE_SELECTOR" (join "," $pairs) "SBX_KUBERNETES_TOLERATIONS" (join "," .tolerations) "SBX_KUBERNETES_BOOT_SECONDS" .bootSeconds "SBX_KUBERNETES_CLAIMS" .claims "SBX_KUBERNETES_CANARY" .canary) }}
{{- end }}
{{- end }}
{{- range $name := keys $given | sortAlpha }}
{{- if ne (toString (get $given $name)) "" }}
- {name: {{ $name }}, value: {{ get $given $name | toString | quote }}}
{{- end }}
{{- end }}
{{- end }}
