//! The Helm chart: its lints, what it refuses and how it says so, and what it tells after an installation.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;

use serde_json::Value;

use super::render::{CHART, helm, load, root, text_of, values_of};
use super::scenarios;
use crate::support::{Process, checker};

#[test]
fn helm_lint_is_content() {
    let test = "helm_lint_is_content";
    for scenario in std::iter::once(None).chain(scenarios().iter().map(Some)) {
        let Some(mut command) = checker(test, "helm") else { return };
        command.args(["lint", "--strict"]).arg(root().join(CHART));
        if let Some(scenario) = scenario {
            command.arg("--values").arg(values_of(scenario));
        }
        let (status, output) = Process::run(&mut command);
        assert!(status.success(), "{scenario:?}: {output}");
    }
}

#[test]
fn its_default_configuration_is_the_bases() {
    let values = &load(&text_of("deploy/helm/preface/values.yaml"))[0];
    assert_eq!(values["config"].as_str(), Some(text_of("deploy/kustomize/base/preface.toml").as_str()));
}

/// Every value has its place in the schema, and the schema names nothing else.
#[test]
fn its_schema_knows_every_value() {
    let schema: Value = serde_json::from_str(&text_of("deploy/helm/preface/values.schema.json")).expect("JSON");
    let values = &load(&text_of("deploy/helm/preface/values.yaml"))[0];
    let keys = |value: &Value| value.as_object().expect("a table").keys().cloned().collect::<BTreeSet<_>>();
    let mut known = keys(&schema["properties"]);
    assert!(known.remove("global"), "Helm's own");
    assert_eq!(known, keys(values));
    for table in ["image", "service", "podDisruptionBudget", "networkPolicy", "autoscaling", "monitoring"] {
        assert_eq!(keys(&schema["properties"][table]["properties"]), keys(&values[table]), "{table}");
    }
}

/// A configuration with this text in its default's place.
fn config_with(from: &str, to: &str) -> String {
    let text = text_of("deploy/kustomize/base/preface.toml");
    assert!(text.contains(from), "{from}");
    text.replacen(from, to, 1)
}

/// What cannot work is said before anything is installed.
#[test]
fn what_cannot_work_is_an_error() {
    let test = "what_cannot_work_is_an_error";
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("preface.toml");
    let cases: &[(&str, &str, &[&str])] = &[
        ("bind = \":8080\"", "bind = \":80\"", &[]),
        ("bind = \":8080\"", "bind = [\":8080\", \":8081\"]", &[]),
        ("[listeners.http]", "[listeners.a_name_that_is_too_long]", &[]),
        ("[listeners.http]", "[listeners.web]", &[]),
        ("probe_bind", "#probe_bind", &[]),
        ("0.0.0.0:9901", "127.0.0.1:9901", &[]),
        ("stop_timeout = \"50s\"", "stop_timeout = \"2m 5s\"", &["--set", "terminationGracePeriodSeconds=60"]),
        ("stop_timeout = \"50s\"", "stop_timeout = \"1fortnight\"", &[]),
        ("[admin]", "[admin", &[]),
        ("", "", &["--set", "kind=DaemonSet,autoscaling.enabled=true"]),
        ("", "", &["--set", "kind=StatefulSet"]),
        ("", "", &["--set", "services.type=NodePort"]),
        ("", "", &["--set", "image.digest=latest"]),
    ];
    let mut said = String::new();
    for (from, to, arguments) in cases {
        fs::write(&file, config_with(from, to)).expect("the file is written");
        let Some(mut command) = checker(test, "helm") else { return };
        command.args(["template", "preface"]).arg(root().join(CHART)).args(*arguments);
        let (status, output) = Process::run(command.arg("--set-file").arg(format!("config={}", file.display())));
        assert!(!status.success(), "{to} {arguments:?} is taken");
        let (_, message) = output.split_once("Error: ").expect("helm says what is wrong");
        // Without the line of the template, and without what helm says about itself.
        let message = message.split_once("execution error at (").and_then(|(_, rest)| rest.split_once("): "));
        let message = message.map_or(output.as_str(), |(_, message)| message);
        let message = message.split("\n\n").next().expect("the first paragraph");
        writeln!(said, "{}\n{message}\n", [*to, &arguments.join(" ")].join(" ").trim()).expect("a string takes it");
    }
    insta::assert_snapshot!(said);
}

/// The grace period follows the file, in whatever words it says its times.
#[test]
fn the_grace_period_follows_the_file() {
    let test = "the_grace_period_follows_the_file";
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("preface.toml");
    for (timeout, seconds) in
        [("\"50s\"", 60), ("\"1m 30s\"", 100), ("\"2min\"", 130), ("\"1h\"", 3610), ("\"1500ms\"", 12), ("\"80s\"", 90)]
    {
        let toml = config_with("stop_timeout = \"50s\"", &format!("stop_timeout = {timeout}"));
        preface::config::parse("preface.toml", &toml).expect("preface reads it, too");
        fs::write(&file, toml).expect("the file is written");
        let Some(mut command) = checker(test, "helm") else { return };
        command.args(["template", "preface"]).arg(root().join(CHART));
        let (status, output) = Process::run(command.arg("--set-file").arg(format!("config={}", file.display())));
        assert!(status.success(), "{output}");
        assert!(output.contains(&format!("terminationGracePeriodSeconds: {seconds}\n")), "{timeout}: {output}");
    }
}

/// TCP and UDP on one port, names, a registry of its own, a restart on each change.
#[test]
fn the_scenario_of_dns_uses_what_the_others_do_not() {
    let Some(dns) = helm("the_scenario_of_dns_uses_what_the_others_do_not", Some("dns")) else { return };
    let find = |kind: &str| dns.objects.iter().find(|object| object["kind"] == kind).expect("an object of this kind");
    let ports = &find("Service")["spec"]["ports"];
    for (index, (name, protocol)) in [("dns", "TCP"), ("dns-udp", "UDP")].into_iter().enumerate() {
        assert_eq!((&ports[index]["name"], &ports[index]["port"]), (&Value::from(name), &Value::from(53)));
        assert_eq!(ports[index]["protocol"], protocol);
    }
    let deployment = find("Deployment");
    assert_eq!(deployment["metadata"]["name"], "dns");
    assert_eq!(deployment["spec"]["replicas"], 3);
    let pod = &deployment["spec"]["template"];
    assert_eq!(pod["metadata"]["annotations"]["checksum/config"].as_str().map(str::len), Some(64));
    assert_eq!(pod["spec"]["containers"][0]["image"], "registry.example/preface:0.1.0");
    assert_eq!(pod["spec"]["terminationGracePeriodSeconds"], 120);
    // The default: a change of the configuration is a reload.
    let Some(default) = helm("the_scenario_of_dns_uses_what_the_others_do_not", None) else { return };
    assert!(!default.text.contains("checksum/"));
}

#[test]
fn it_says_what_comes_next() {
    let Some(mut command) = checker("it_says_what_comes_next", "helm") else { return };
    command.args(["install", "preface"]).arg(root().join(CHART)).args(["--namespace", "preface", "--dry-run=client"]);
    let (status, output) = Process::run(&mut command);
    assert!(status.success(), "{output}");
    let (_, notes) = output.split_once("NOTES:\n").expect("the chart has notes");
    insta::assert_snapshot!(notes);
}

#[test]
fn everything_is_of_one_version() {
    let version = env!("CARGO_PKG_VERSION");
    let chart = &load(&text_of("deploy/helm/preface/Chart.yaml"))[0];
    assert_eq!((chart["version"].as_str(), chart["appVersion"].as_str()), (Some(version), Some(version)));
    let base = &load(&text_of("deploy/kustomize/base/kustomization.yaml"))[0];
    assert_eq!(base["images"][0]["newTag"], version);
}
