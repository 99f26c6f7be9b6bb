{{- define "preface.fullname" -}}
{{- $name := .Values.fullnameOverride -}}
{{- if not $name -}}
{{- $name = contains .Chart.Name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name) -}}
{{- end -}}
{{- $name | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- define "preface.selectorLabels" -}}
app.kubernetes.io/name: preface
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "preface.labels" -}}
{{ include "preface.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "preface.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- /* The configuration as JSON. */ -}}
{{- define "preface.toml" -}}
{{- $toml := fromToml .Values.config -}}
{{- if and (hasKey $toml "Error") (not (hasKey $toml "listeners")) -}}
{{- fail (printf "config: %s" (get $toml "Error")) -}}
{{- end -}}
{{- if not (get $toml "listeners") -}}
{{- fail "config: there is no listener; see the chart's values.yaml for a start" -}}
{{- end -}}
{{- toJson $toml -}}
{{- end -}}

{{- /* "1m 30s" in whole seconds, rounded up. */ -}}
{{- define "preface.seconds" -}}
{{- $ms := 0 -}}
{{- range regexFindAll "[0-9]+ *[a-z]+" . -1 -}}
{{- $number := regexFind "[0-9]+" . | int -}}
{{- $unit := regexFind "[a-z]+" . -}}
{{- if has $unit (list "ms" "msec" "millis") -}}{{- $ms = add $ms $number -}}
{{- else if has $unit (list "s" "sec" "secs" "second" "seconds") -}}{{- $ms = add $ms (mul $number 1000) -}}
{{- else if has $unit (list "m" "min" "mins" "minute" "minutes") -}}{{- $ms = add $ms (mul $number 60000) -}}
{{- else if has $unit (list "h" "hr" "hrs" "hour" "hours") -}}{{- $ms = add $ms (mul $number 3600000) -}}
{{- else -}}{{- fail (printf "config: the chart cannot read the duration %q; write it in h, m and s" $) -}}
{{- end -}}
{{- end -}}
{{- div (add $ms 999) 1000 -}}
{{- end -}}

{{- /* What terminationGracePeriodSeconds must at least be. */ -}}
{{- define "preface.stopping" -}}
{{- $runtime := (include "preface.toml" . | fromJson).runtime | default dict -}}
{{- $delay := include "preface.seconds" (get $runtime "stop_delay" | default "0s") | int -}}
{{- $timeout := include "preface.seconds" (get $runtime "stop_timeout" | default "80s") | int -}}
{{- add $delay $timeout 5 -}}
{{- end -}}

{{- define "preface.gracePeriod" -}}
{{- $least := include "preface.stopping" . | int -}}
{{- $set := .Values.terminationGracePeriodSeconds -}}
{{- if and $set (lt (int $set) $least) -}}
{{- fail (printf "terminationGracePeriodSeconds is %d, but preface may take stop_delay + stop_timeout, and 5 s: %d; raise it, or shorten stop_timeout in config" (int $set) $least) -}}
{{- end -}}
{{- $set | default $least -}}
{{- end -}}

{{- /* A JSON list of {listener, name, port, protocol}, out of the listeners' binds. */ -}}
{{- define "preface.ports" -}}
{{- $ports := list -}}
{{- $chart := . -}}
{{- range $listener, $settings := (include "preface.toml" . | fromJson).listeners -}}
{{- $binds := kindIs "slice" $settings.bind | ternary $settings.bind (list $settings.bind) -}}
{{- $protocol := $settings.protocol | default "tcp" -}}
{{- $protocols := kindIs "slice" $protocol | ternary $protocol (list $protocol) -}}
{{- $numbers := list -}}
{{- range $binds -}}
{{- $number := regexFind ":[0-9]+$" . | trimPrefix ":" | int -}}
{{- if $number -}}{{- $numbers = append $numbers $number -}}{{- end -}}
{{- end -}}
{{- $numbers = uniq $numbers -}}
{{- if gt (len $numbers) 1 -}}
{{- fail (printf "listeners.%s binds several ports; the chart wants one a listener: make several listeners of it" $listener) -}}
{{- end -}}
{{- range $number := $numbers -}}
{{- if and (lt $number 1024) (not $chart.Values.hostNetwork) (not $chart.Values.lowPorts) -}}
{{- fail (printf "listeners.%s: an unprivileged pod cannot bind port %d; bind one from 1024 up and name %d under service.ports, or set lowPorts" $listener $number $number) -}}
{{- end -}}
{{- range $index, $one := $protocols -}}
{{- $name := eq $index 0 | ternary $listener (printf "%s-%s" $listener $one) | lower | replace "_" "-" | replace "." "-" -}}
{{- if or (gt (len $name) 15) (not (regexMatch "^[a-z0-9]+(-[a-z0-9]+)*$" $name)) (not (regexMatch "[a-z]" $name)) -}}
{{- fail (printf "listeners.%s: Kubernetes does not take %q as a port's name (15 of a-z, 0-9, -, and a letter among them); rename the listener" $listener $name) -}}
{{- end -}}
{{- $ports = append $ports (dict "listener" $listener "name" $name "port" $number "protocol" (upper $one)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if not $ports -}}{{- fail "config: no listener binds a port" -}}{{- end -}}
{{- toJson $ports -}}
{{- end -}}

{{- /* The port of [admin] probe_bind. */ -}}
{{- define "preface.probePort" -}}
{{- $admin := (include "preface.toml" . | fromJson).admin | default dict -}}
{{- $bind := get $admin "probe_bind" | default "" -}}
{{- if not $bind -}}
{{- fail "config: the kubelet's probes need [admin] probe_bind = \"0.0.0.0:9901\"; what changes something stays on loopback" -}}
{{- end -}}
{{- if or (hasPrefix "127." $bind) (hasPrefix "[::1]" $bind) -}}
{{- fail (printf "config: [admin] probe_bind = %q is loopback, which the kubelet cannot reach; \"0.0.0.0:9901\" is every address" $bind) -}}
{{- end -}}
{{- regexFind "[0-9]+$" $bind -}}
{{- end -}}
