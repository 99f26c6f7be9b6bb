//! What must hold between the objects of one deployment: each rule looks at all of them and says what is wrong.

use std::collections::BTreeSet;
use std::time::Duration;

use preface::config::{self, Config};
use serde_json::{Value, json};

use super::render::{identity, kustomize};

/// Everything that is wrong with these objects as one deployment of preface.
pub fn complaints(objects: &[Value]) -> Vec<String> {
    match Deployment::of(objects) {
        Ok(deployment) => {
            let rules = [
                Deployment::stops_in_time,
                Deployment::ports_are_the_files,
                Deployment::probes_ask_the_probe_port,
                Deployment::shares_the_processors,
                Deployment::is_restricted,
                Deployment::keeps_its_configuration_fresh,
                Deployment::is_replaced_without_a_gap,
                Deployment::is_selected,
                Deployment::is_scaled_by_one,
                Deployment::is_watched,
            ];
            let mut found = Vec::new();
            rules.iter().for_each(|rule| rule(&deployment, &mut |what| found.push(what)));
            found
        }
        Err(what) => vec![what],
    }
}

struct Deployment<'a> {
    objects: &'a [Value],
    workload: &'a Value,
    pod: &'a Value,
    container: &'a Value,
    toml: toml::Table,
    config: Config,
}

type Complain<'a> = &'a mut dyn FnMut(String);

impl<'a> Deployment<'a> {
    fn of(objects: &'a [Value]) -> Result<Deployment<'a>, String> {
        let workload = objects
            .iter()
            .find(|object| object["kind"] == "Deployment" || object["kind"] == "DaemonSet")
            .ok_or("there is neither a Deployment nor a DaemonSet")?;
        let pod = &workload["spec"]["template"]["spec"];
        let container = &pod["containers"][0];
        let mount = items(&container["volumeMounts"]).find(|mount| mount["mountPath"] == "/etc/preface");
        let mount = mount.ok_or("nothing is mounted on /etc/preface")?;
        let volume = items(&pod["volumes"]).find(|volume| volume["name"] == mount["name"]);
        let name = &volume.ok_or("the mount has no volume")?["configMap"]["name"];
        let map = objects.iter().find(|object| object["kind"] == "ConfigMap" && object["metadata"]["name"] == *name);
        let text = map.and_then(|map| map["data"]["preface.toml"].as_str());
        let text = text.ok_or(format!("no ConfigMap {name} has a preface.toml"))?;
        let parsed = config::parse("preface.toml", text).map_err(|errors| format!("{errors:?}"))?;
        if !parsed.warnings.is_empty() {
            return Err(format!("{:?}", parsed.warnings));
        }
        let toml = text.parse().map_err(|error| format!("{error}"))?;
        Ok(Deployment { objects, workload, pod, container, toml, config: parsed.config })
    }

    fn of_kind(&self, kind: &'static str) -> impl Iterator<Item = &'a Value> + use<'a> {
        self.objects.iter().filter(move |object| object["kind"] == kind)
    }

    fn on_host_network(&self) -> bool {
        self.pod["hostNetwork"] == true
    }

    fn pod_has(&self, selector: &Value) -> bool {
        within(selector, &self.workload["spec"]["template"]["metadata"]["labels"])
    }

    fn port_names(&self) -> BTreeSet<&'a str> {
        items(&self.container["ports"]).filter_map(|port| port["name"].as_str()).collect()
    }

    /// (port, protocol) of every listener.
    fn listener_ports(&self) -> BTreeSet<(u64, String)> {
        let mut found = BTreeSet::new();
        for listener in self.toml["listeners"].as_table().into_iter().flatten().map(|(_, listener)| listener) {
            let several = |key: &str, default: &str| match listener.get(key) {
                Some(toml::Value::Array(values)) => {
                    values.iter().map(|value| value.as_str().unwrap().to_owned()).collect()
                }
                Some(value) => vec![value.as_str().expect("a string").to_owned()],
                None => vec![default.to_owned()],
            };
            let binds = several("bind", "");
            let ports = binds.iter().filter_map(|bind| bind.rsplit_once(':')?.1.parse().ok());
            for port in ports {
                found.extend(several("protocol", "tcp").into_iter().map(|protocol| (port, protocol.to_uppercase())));
            }
        }
        found
    }

    fn stops_in_time(&self, complain: Complain) {
        let runtime = &self.config.runtime;
        let least = runtime.stop_delay + runtime.stop_timeout + Duration::from_secs(5);
        let grace = self.pod["terminationGracePeriodSeconds"].as_u64().unwrap_or(30);
        if Duration::from_secs(grace) < least {
            complain(format!("killed after {grace} s, but stopping may take {least:?}"));
        }
        if runtime.stop_delay < Duration::from_secs(5) {
            complain("stop_delay is below 5 s: endpoints leave later than that".to_owned());
        }
    }

    fn ports_are_the_files(&self, complain: Complain) {
        let probes = self.config.admin.probe_bind.map(|address| u64::from(address.port()));
        let (mut found, mut names) = (BTreeSet::new(), BTreeSet::new());
        for port in items(&self.container["ports"]) {
            let name = port["name"].as_str().unwrap_or("");
            if !names.insert(name) || name.is_empty() || name.len() > 15 {
                complain(format!("port name {name:?}"));
            }
            let number = port["containerPort"].as_u64().unwrap_or(0);
            if name != "probes" {
                found.insert((number, port["protocol"].as_str().unwrap_or("TCP").to_owned()));
            } else if Some(number) != probes {
                complain(format!("port probes is {number}, probe_bind is {probes:?}"));
            }
        }
        let wanted = self.listener_ports();
        if found != wanted {
            complain(format!("the container has ports {found:?}, the file {wanted:?}"));
        }
        let by_sysctl = items(&self.pod["securityContext"]["sysctls"]).any(|sysctl| {
            sysctl["name"] == "net.ipv4.ip_unprivileged_port_start" && sysctl["value"] == "0" && !self.on_host_network()
        });
        let capabilities = &self.container["securityContext"]["capabilities"]["add"];
        let as_root = self.pod["securityContext"]["runAsUser"] == 0 && has(capabilities, "NET_BIND_SERVICE");
        if !by_sysctl && !as_root && wanted.iter().any(|(port, _)| *port < 1024) {
            complain(format!("an unprivileged pod cannot bind {wanted:?}"));
        }
    }

    fn probes_ask_the_probe_port(&self, complain: Complain) {
        match self.config.admin.probe_bind {
            None => complain("no probe_bind".to_owned()),
            Some(address) if address.ip().is_loopback() => complain(format!("the kubelet cannot reach {address}")),
            Some(_) => {}
        }
        for (probe, path) in [("startupProbe", "/readyz"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")] {
            let asked = &self.container[probe]["httpGet"];
            if asked["path"] != path || asked["port"] != "probes" {
                complain(format!("{probe} asks {asked}"));
            }
        }
        let startup = &self.container["startupProbe"];
        if startup["periodSeconds"] != 1 || startup["failureThreshold"] != 30 {
            complain(format!("startupProbe is {startup}"));
        }
        if !self.port_names().contains("probes") {
            complain("no port is called probes".to_owned());
        }
        let admin = self.toml.get("admin").and_then(|admin| admin.get("bind")).and_then(toml::Value::as_str);
        if !admin.unwrap_or("127.0.0.1:9900").starts_with(if self.on_host_network() { "unix:" } else { "127.0.0.1:" }) {
            complain(format!("who reaches {admin:?} changes things"));
        }
    }

    fn shares_the_processors(&self, complain: Complain) {
        let resources = &self.container["resources"];
        if self.config.runtime.workers == 0 || resources["requests"]["cpu"].is_null() {
            complain("a pod has no idea of its share of the node: set workers and requests.cpu".to_owned());
        }
        if !resources["limits"]["cpu"].is_null() {
            complain("a CPU limit is latency for every connection".to_owned());
        }
        if resources["limits"]["memory"].is_null() {
            complain("no limit of memory".to_owned());
        }
        let image = self.container["image"].as_str().unwrap_or("");
        if !image.contains(':') || image.ends_with(":latest") {
            complain(format!("image {image:?} is another one tomorrow"));
        }
    }

    /// PodSecurity `restricted`; on the host's network, which is `privileged`, as much of it as goes.
    fn is_restricted(&self, complain: Complain) {
        let (pod, container) = (&self.pod["securityContext"], &self.container["securityContext"]);
        let (user, added) =
            if self.on_host_network() { (0, json!(["NET_BIND_SERVICE"])) } else { (65532, Value::Null) };
        for (what, found, wanted) in [
            ("runAsNonRoot", &pod["runAsNonRoot"], json!(!self.on_host_network())),
            ("runAsUser", &pod["runAsUser"], json!(user)),
            ("seccompProfile", &pod["seccompProfile"]["type"], json!("RuntimeDefault")),
            ("allowPrivilegeEscalation", &container["allowPrivilegeEscalation"], json!(false)),
            ("readOnlyRootFilesystem", &container["readOnlyRootFilesystem"], json!(true)),
            ("capabilities.drop", &container["capabilities"]["drop"], json!(["ALL"])),
            ("capabilities.add", &container["capabilities"]["add"], added),
            ("privileged", &container["privileged"], Value::Null),
            ("automountServiceAccountToken", &self.pod["automountServiceAccountToken"], json!(false)),
            ("hostPID", &self.pod["hostPID"], Value::Null),
            ("hostIPC", &self.pod["hostIPC"], Value::Null),
        ] {
            if *found != wanted {
                complain(format!("{what} is {found}, not {wanted}"));
            }
        }
        if items(&self.pod["containers"]).count() != 1 || !self.pod["initContainers"].is_null() {
            complain("there are other containers, which nobody checks".to_owned());
        }
        for volume in items(&self.pod["volumes"]) {
            if !["configMap", "emptyDir", "secret", "projected"].iter().any(|kind| volume.get(kind).is_some()) {
                complain(format!("volume {volume}"));
            }
        }
    }

    fn keeps_its_configuration_fresh(&self, complain: Complain) {
        if self.objects.iter().any(|object| object.to_string().contains("\"subPath")) {
            complain("what is mounted by subPath never changes again".to_owned());
        }
    }

    fn is_replaced_without_a_gap(&self, complain: Complain) {
        let spec = &self.workload["spec"];
        let (found, wanted) = match self.workload["kind"] == "Deployment" {
            true => (&spec["strategy"]["rollingUpdate"], json!({"maxUnavailable": 0, "maxSurge": 1})),
            false => (&spec["updateStrategy"]["rollingUpdate"], json!({"maxUnavailable": 1})),
        };
        if *found != wanted {
            complain(format!("rollingUpdate is {found}, not {wanted}"));
        }
        let budgets: Vec<&Value> = self.of_kind("PodDisruptionBudget").map(|budget| &budget["spec"]).collect();
        let good = |budget: &&Value| {
            let pods = &budget["selector"]["matchLabels"];
            budget["maxUnavailable"] == 1 && budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow" && self.pod_has(pods)
        };
        let wanted = usize::from(self.workload["kind"] == "Deployment");
        if budgets.len() != wanted || !budgets.iter().all(good) {
            complain(format!("budgets: {budgets:?}"));
        }
        let spread: Vec<&Value> = items(&self.pod["topologySpreadConstraints"]).collect();
        let by_host = |spread: &&Value| {
            spread["topologyKey"] == "kubernetes.io/hostname" && self.pod_has(&spread["labelSelector"]["matchLabels"])
        };
        if spread.len() != wanted || !spread.iter().all(by_host) {
            complain(format!("spread: {spread:?}"));
        }
    }

    /// Services, NetworkPolicies and the workload itself mean these pods and these ports.
    fn is_selected(&self, complain: Complain) {
        if !self.pod_has(&self.workload["spec"]["selector"]["matchLabels"]) {
            complain("the workload does not select its own pods".to_owned());
        }
        let names = self.port_names();
        for service in self.of_kind("Service") {
            let (spec, who) = (&service["spec"], identity(service));
            if !self.pod_has(&spec["selector"]) {
                complain(format!("{who} selects other pods"));
            }
            if spec["type"] == "LoadBalancer" && spec["externalTrafficPolicy"] != "Local" {
                complain(format!("{who}: kube-proxy rewrites the source"));
            }
            for port in items(&spec["ports"]) {
                match port["targetPort"].as_str() {
                    Some(name) if names.contains(name) => {}
                    _ => complain(format!("{who}: there is no port {}", port["targetPort"])),
                }
                if spec["type"] == "LoadBalancer" && port["targetPort"] == "probes" {
                    complain(format!("{who} publishes the probes"));
                }
            }
        }
        for policy in self.of_kind("NetworkPolicy") {
            if !self.pod_has(&policy["spec"]["podSelector"]["matchLabels"]) || self.on_host_network() {
                complain("the NetworkPolicy is about other pods".to_owned());
            }
            let open = items(&policy["spec"]["ingress"]).flat_map(|rule| items(&rule["ports"]));
            let open: BTreeSet<&str> = open.filter_map(|port| port["port"].as_str()).collect();
            if open != names {
                complain(format!("the NetworkPolicy opens {open:?}, the pod has {names:?}"));
            }
        }
    }

    fn is_scaled_by_one(&self, complain: Complain) {
        let scaled: Vec<&Value> = self.of_kind("HorizontalPodAutoscaler").collect();
        for scaler in &scaled {
            let target = &scaler["spec"]["scaleTargetRef"];
            if target["kind"] != self.workload["kind"] || target["name"] != self.workload["metadata"]["name"] {
                complain(format!("it scales {target}"));
            }
        }
        let is_fixed = !self.workload["spec"]["replicas"].is_null();
        if is_fixed != (scaled.is_empty() && self.workload["kind"] == "Deployment") {
            complain("either replicas or an autoscaler".to_owned());
        }
    }

    fn is_watched(&self, complain: Complain) {
        for monitor in self.of_kind("ServiceMonitor") {
            let spec = &monitor["spec"];
            let selector = &spec["selector"]["matchLabels"];
            let found: Vec<&Value> =
                self.of_kind("Service").filter(|service| within(selector, &service["metadata"]["labels"])).collect();
            let [service] = found[..] else {
                complain(format!("the ServiceMonitor finds {} Services", found.len()));
                continue;
            };
            if spec["jobLabel"].as_str().map(|label| &service["metadata"]["labels"][label]) != Some(&json!("preface")) {
                complain("the alerts want job=\"preface\"".to_owned());
            }
            for endpoint in items(&spec["endpoints"]) {
                if !items(&service["spec"]["ports"]).any(|port| port["name"] == endpoint["port"]) {
                    complain(format!("the Service has no port {}", endpoint["port"]));
                }
            }
        }
    }
}

fn items(array: &Value) -> impl Iterator<Item = &Value> {
    array.as_array().into_iter().flatten()
}

fn has(array: &Value, wanted: &str) -> bool {
    items(array).any(|item| item == wanted)
}

/// Every label of a selector is among the labels, and there is one.
fn within(selector: &Value, labels: &Value) -> bool {
    selector.as_object().is_some_and(|wanted| {
        !wanted.is_empty() && wanted.iter().all(|(label, value)| labels.get(label) == Some(value))
    })
}

/// An object's kind, what is changed in it (POD and C stand for a pod's specification and its container), to what, and words
/// of the complaint.
type Change = (&'static str, &'static str, Value, &'static str);

fn changes() -> Vec<Change> {
    vec![
        ("Deployment", "POD/terminationGracePeriodSeconds", json!(59), "killed after 59 s"),
        ("Deployment", "POD/C/ports/0/containerPort", json!(8081), "the container has ports"),
        ("Deployment", "POD/C/ports/0/name", json!("web"), "there is no port"),
        ("Deployment", "POD/C/ports/2/containerPort", json!(9900), "port probes is 9900"),
        ("Deployment", "POD/C/livenessProbe/httpGet/path", json!("/readyz"), "livenessProbe"),
        ("Deployment", "POD/C/readinessProbe/httpGet/port", json!("http"), "readinessProbe"),
        ("Deployment", "POD/C/resources/limits", json!({"cpu": 1}), "a CPU limit"),
        ("Deployment", "POD/C/resources/requests", json!({}), "set workers and requests"),
        ("Deployment", "POD/C/image", json!("preface:latest"), "another one tomorrow"),
        ("Deployment", "POD/securityContext/runAsNonRoot", json!(false), "runAsNonRoot"),
        ("Deployment", "POD/securityContext/seccompProfile", json!({}), "seccompProfile"),
        ("Deployment", "POD/C/securityContext/capabilities/drop", json!([]), "capabilities"),
        ("Deployment", "POD/C/securityContext/readOnlyRootFilesystem", json!(false), "readOnly"),
        ("Deployment", "POD/C/securityContext/allowPrivilegeEscalation", json!(true), "allowP"),
        ("Deployment", "POD/automountServiceAccountToken", json!(true), "automount"),
        ("Deployment", "POD/volumes/0", json!({"name": "config", "hostPath": {}}), "no ConfigMap"),
        ("Deployment", "POD/volumes/0/configMap/name", json!("other"), "no ConfigMap"),
        ("Deployment", "POD/C/volumeMounts/0/mountPath", json!("/etc"), "nothing is mounted"),
        (
            "Deployment",
            "POD/C/volumeMounts/0",
            json!({"name": "config", "mountPath": "/etc/preface", "subPath": "preface.toml"}),
            "by subPath",
        ),
        ("Deployment", "/spec/strategy/rollingUpdate/maxUnavailable", json!(1), "rollingUpdate"),
        ("Deployment", "/spec/selector/matchLabels", json!({"app": "x"}), "does not select its own pods"),
        ("Deployment", "POD/topologySpreadConstraints/0/topologyKey", json!("zone"), "spread"),
        ("PodDisruptionBudget", "/spec/maxUnavailable", json!(2), "budgets"),
        ("PodDisruptionBudget", "/spec/selector/matchLabels", json!({}), "budgets"),
        ("Service", "/spec/selector", json!({"app.kubernetes.io/name": "other"}), "selects other pods"),
        ("Service", "/spec/externalTrafficPolicy", json!("Cluster"), "kube-proxy rewrites"),
        ("Service", "/spec/ports/0/targetPort", json!("probes"), "publishes the probes"),
        ("NetworkPolicy", "/spec/podSelector/matchLabels", json!({"app": "x"}), "other pods"),
        ("NetworkPolicy", "/spec/ingress/1/ports/0/port", json!("metrics"), "the NetworkPolicy opens"),
        (
            "ServiceMonitor",
            "/spec/selector/matchLabels",
            json!({"app.kubernetes.io/name": "preface"}),
            "finds 2 Services",
        ),
        ("ServiceMonitor", "/spec/endpoints/0/port", json!("metrics"), "no port \"metrics\""),
        ("ServiceMonitor", "/spec/jobLabel", json!("app"), "job="),
    ]
}

/// Every rule sees what it is there for: one thing is changed at a time.
#[test]
fn each_rule_finds_what_it_forbids() {
    let test = "each_rule_finds_what_it_forbids";
    let Some(monitoring) = kustomize(test, "deploy/kustomize/overlays/monitoring") else { return };
    let Some(hpa) = kustomize(test, "deploy/kustomize/overlays/hpa") else { return };
    let of_hpa = vec![("HorizontalPodAutoscaler", "/spec/scaleTargetRef/name", json!("other"), "it scales")];
    for (objects, changes) in [(&monitoring.objects, changes()), (&hpa.objects, of_hpa)] {
        assert_eq!(complaints(objects), [""; 0]);
        for (kind, pointer, value, complaint) in changes {
            let mut changed = objects.clone();
            let pointer = pointer.replacen("POD", "/spec/template/spec", 1).replacen("/C/", "/containers/0/", 1);
            let object = changed.iter_mut().find(|object| object["kind"] == kind).expect("an object of this kind");
            *object.pointer_mut(&pointer).unwrap_or_else(|| panic!("{kind} has no {pointer}")) = value.clone();
            let found = complaints(&changed);
            assert!(found.iter().any(|found| found.contains(complaint)), "{kind} {pointer} = {value}: {found:#?}");
        }
    }
}

/// The same for the file in the ConfigMap.
#[test]
fn each_rule_looks_into_the_file() {
    let Some(base) = kustomize("each_rule_looks_into_the_file", "deploy/kustomize/base") else { return };
    for (from, to, complaint) in [
        ("workers = 2", "workers = 0", "set workers"),
        ("stop_timeout = \"50s\"", "stop_timeout = \"51s\"", "killed after 60 s"),
        ("stop_delay = \"5s\"", "stop_delay = \"1s\"", "below 5 s"),
        ("bind = \":8080\"", "bind = \":8081\"", "the container has ports"),
        ("probe_bind = \"0.0.0.0:9901\"", "probe_bind = \"0.0.0.0:9902\"", "port probes is 9901"),
        ("probe_bind = \"0.0.0.0:9901\"", "probe_bind = \"127.0.0.1:9901\"", "the kubelet cannot reach"),
        ("probe_bind", "#probe_bind", "no probe_bind"),
        ("[pools.http]", "[pools.htpp]", "http"),
    ] {
        let mut changed = base.objects.clone();
        let map = changed.iter_mut().find(|object| object["kind"] == "ConfigMap").expect("a ConfigMap");
        let text = map["data"]["preface.toml"].as_str().expect("a file").to_owned();
        assert!(text.contains(from), "{from}");
        map["data"]["preface.toml"] = text.replacen(from, to, 1).into();
        let found = complaints(&changed);
        assert!(found.iter().any(|found| found.contains(complaint)), "{to}: {found:#?}");
    }
}
