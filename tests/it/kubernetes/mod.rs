//! What `deploy/` holds for Kubernetes, without a cluster: it renders, it is valid for the oldest and the newest release
//! that they are for, kustomize and Helm mean the same, and what one file says fits what the others say.

mod chart;
mod render;
mod rules;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use preface::config::{self, hints::Surroundings};
use serde_json::Value;

use crate::readme::commands;
use crate::support::{Process, checker, skip};
use render::{Rendered, helm, kustomize, load, root, text_of};

/// The oldest and the newest release of Kubernetes that the manifests are for. 1.34 is at its end; clouds still run it.
const SUPPORTED: [&str; 2] = ["1.34", "1.37"];

/// Kinds that Kubernetes itself does not know; nobody here has their schemas.
const CUSTOM: [&str; 3] = ["ServiceMonitor", "PrometheusRule", "ClientTrafficPolicy"];

/// Directories of kustomize, each with the chart's values that mean the same.
const SAME: [(&str, Option<&str>); 6] = [
    ("deploy/kustomize/base", None),
    ("deploy/kustomize/overlays/hostnetwork-daemonset", Some("hostnetwork-daemonset")),
    ("deploy/kustomize/overlays/aws-nlb", Some("aws-nlb")),
    ("deploy/kustomize/overlays/ingress-nginx", Some("ingress-nginx")),
    ("deploy/kustomize/overlays/hpa", Some("hpa")),
    ("deploy/kustomize/overlays/monitoring", Some("monitoring")),
];

/// The chart's scenarios: the files in its `ci`.
fn scenarios() -> Vec<String> {
    let files = fs::read_dir(root().join("deploy/helm/preface/ci")).expect("the chart has scenarios");
    let names = files.map(|file| file.expect("a file").file_name().into_string().expect("a name"));
    let mut names: Vec<String> =
        names.map(|name| name.strip_suffix("-values.yaml").expect("it ends in -values.yaml").to_owned()).collect();
    names.sort();
    names
}

/// Everything that kustomize and Helm make of `deploy/`; `None`, and SKIP, where one of them is missing.
fn all(test: &str) -> Option<Vec<Rendered>> {
    let mut found = Vec::new();
    for (directory, _) in SAME {
        found.push(kustomize(test, directory)?);
    }
    found.push(helm(test, None)?);
    for scenario in scenarios() {
        found.push(helm(test, Some(&scenario))?);
    }
    Some(found)
}

/// Files below a directory with this extension.
fn files(directory: &str, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut directories = vec![root().join(directory)];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display())) {
            let path = entry.expect("an entry").path();
            match path.is_dir() {
                true => directories.push(path),
                false if path.extension().is_some_and(|found| found == extension) => found.push(path),
                false => {}
            }
        }
    }
    found.sort();
    found
}

#[test]
fn every_overlay_and_every_scenario_is_compared() {
    let overlays = fs::read_dir(root().join("deploy/kustomize/overlays")).expect("there are overlays");
    for overlay in overlays {
        let name = overlay.expect("an entry").file_name().into_string().expect("a name");
        assert!(SAME.iter().any(|(directory, values)| directory.ends_with(&name) && *values == Some(&name)), "{name}");
    }
}

#[test]
fn every_toml_is_valid_and_draws_no_warning() {
    let found: Vec<PathBuf> = ["config", "deploy"].iter().flat_map(|directory| files(directory, "toml")).collect();
    assert!(found.len() >= 12, "{found:?}");
    for file in found {
        let parsed = config::load(&file, &Surroundings::default())
            .unwrap_or_else(|errors| panic!("{}: {errors:?}", file.display()));
        assert!(parsed.warnings.is_empty(), "{}: {:?}", file.display(), parsed.warnings);
    }
}

#[test]
fn what_is_rendered_fits_together() {
    let Some(all) = all("what_is_rendered_fits_together") else { return };
    for Rendered { from, objects, .. } in all {
        let complaints = rules::complaints(&objects);
        assert!(complaints.is_empty(), "{from}: {complaints:#?}");
    }
}

#[test]
fn kustomize_and_helm_mean_the_same() {
    for (directory, scenario) in SAME {
        let Some(overlay) = kustomize("kustomize_and_helm_mean_the_same", directory) else { return };
        let Some(chart) = helm("kustomize_and_helm_mean_the_same", scenario) else { return };
        let (overlay, chart) = (render::comparable(overlay.objects), render::comparable(chart.objects));
        let names = |objects: &[Value]| objects.iter().map(render::identity).collect::<Vec<_>>();
        assert_eq!(names(&overlay), names(&chart), "{directory} and the chart");
        for (one, other) in overlay.iter().zip(&chart) {
            let pretty = |object: &Value| serde_json::to_string_pretty(object).expect("JSON");
            assert_eq!(pretty(one), pretty(other), "{directory}: {} of kustomize, of Helm", render::identity(one));
        }
    }
}

/// Valid for a release, or what is wrong. Warnings count, but for kinds that are not Kubernetes' own.
fn validate(mut command: Command, release: &str, file: &Path) -> Vec<String> {
    let (status, output) = Process::run(command.args(["--strict", "-k", release]).arg(file));
    let is_custom = |line: &str| line.starts_with("WARN") && CUSTOM.iter().any(|kind| line.contains(kind));
    let lines = output.lines().filter(|line| !line.trim().is_empty() && !line.starts_with("INFO"));
    let mut found: Vec<String> = lines.filter(|line| !is_custom(line)).map(str::to_owned).collect();
    if !status.success() && found.is_empty() {
        found.push(output);
    }
    found
}

#[test]
fn every_manifest_is_valid_for_the_oldest_and_the_newest_release() {
    let test = "every_manifest_is_valid_for_the_oldest_and_the_newest_release";
    let Some(all) = all(test) else { return };
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("objects.yaml");
    // One run of the validator for all objects: what takes its time is reading the schemas.
    let receivers = ["ingress-nginx", "envoy-gateway"].map(|name| {
        let file = root().join("deploy/receivers").join(name).with_extension("yaml");
        fs::read_to_string(&file).expect("a receiver's file")
    });
    let texts = all.iter().map(|rendered| &rendered.text).chain(&receivers);
    fs::write(&file, texts.map(|text| format!("---\n{text}\n")).collect::<String>()).expect("it is written");
    for release in SUPPORTED {
        let Some(command) = checker(test, "kubernetes-validate") else { return };
        let found = validate(command, release, &file);
        assert!(found.is_empty(), "Kubernetes {release}: {found:#?}");
    }
    // The validator does see what is wrong.
    let wrong = all[0].text.replace("externalTrafficPolicy: Local", "externalTrafficPolicies: Local");
    fs::write(&file, wrong).expect("it is written");
    let Some(command) = checker(test, "kubernetes-validate") else { return };
    assert!(!validate(command, SUPPORTED[1], &file).is_empty());
}

#[test]
fn the_yaml_files_are_tidy() {
    let test = "the_yaml_files_are_tidy";
    let Some(mut command) = checker(test, "yamllint") else { return };
    let all = files("deploy", "yaml");
    let yaml = all.iter().filter(|file| !file.components().any(|part| part.as_os_str() == "templates"));
    let rules = "{extends: default, rules: {line-length: disable, document-start: disable, \
                 comments: {min-spaces-from-content: 1}, braces: {max-spaces-inside: 1}, brackets: {max-spaces-inside: 1}}}";
    let (status, output) = Process::run(command.args(["--strict", "-d", rules]).args(yaml));
    assert!(status.success(), "{output}");
}

#[test]
fn the_dockerfile_is_tidy() {
    let Some(mut command) = checker("the_dockerfile_is_tidy", "hadolint") else { return };
    let (status, output) = Process::run(command.arg(root().join("deploy/docker/Dockerfile")));
    assert!(status.success() && output.is_empty(), "{output}");
}

/// The operator's rule holds the groups of the plain file, line by line, and the chart holds copies.
#[test]
fn alerts_and_dashboard_are_the_same_everywhere() {
    let plain = text_of("deploy/prometheus/alerts.yaml");
    let (_, groups) = plain.split_once("\ngroups:\n").expect("alerts.yaml has groups");
    let indented: String =
        groups.lines().map(|line| if line.is_empty() { "\n".to_owned() } else { format!("  {line}\n") }).collect();
    let rule = text_of("deploy/prometheus/prometheusrule.yaml");
    let (_, found) = rule.split_once("\nspec:\n  groups:\n").expect("a PrometheusRule has groups");
    assert_eq!(found, indented, "copy the groups of alerts.yaml, two spaces further in");
    for (original, copy) in [("prometheus/alerts.yaml", "alerts.yaml"), ("grafana/dashboard.json", "dashboard.json")] {
        let same = text_of(&format!("deploy/{original}")) == text_of(&format!("deploy/helm/preface/files/{copy}"));
        assert!(same, "cp deploy/{original} deploy/helm/preface/files/{copy}");
    }
}

/// Each command of the README's section is run here, or says what it needs that is not here.
#[test]
fn the_readmes_commands_run() {
    let test = "the_readmes_commands_run";
    let (needing, runnable) = commands("Containers and Kubernetes", &["a cluster", "a registry", "Docker"]);
    assert!(needing.len() >= 8 && runnable.len() >= 3, "{needing:#?} {runnable:#?}");
    let Some(helm) = checker(test, "helm") else { return };
    let checkers = Path::new(helm.get_program()).parent().expect("a directory").display().to_string();
    let path = format!("{checkers}:{}", std::env::var("PATH").unwrap_or_default());
    // Somewhere else: one of them makes a directory.
    let directory = tempfile::tempdir().expect("a temporary directory");
    for top in ["config", "deploy"] {
        std::os::unix::fs::symlink(root().join(top), directory.path().join(top)).expect("a link");
    }
    for line in runnable {
        let mut shell = Command::new("sh");
        let (status, output) = Process::run(shell.args(["-ec", line]).current_dir(directory.path()).env("PATH", &path));
        assert!(status.success(), "{line}\n{output}");
    }
}

/// Traefik's file is values of its chart, so no validator of Kubernetes looks at it.
#[test]
fn the_receivers_trust_one_address() {
    let traefik = &load(&text_of("deploy/receivers/traefik.yaml"))[0];
    for port in ["web", "websecure"] {
        assert_eq!(traefik["ports"][port]["proxyProtocol"]["trustedIPs"], serde_json::json!(["10.0.0.5/32"]));
    }
    let ingress = load(&text_of("deploy/receivers/ingress-nginx.yaml"));
    assert_eq!(ingress[0]["data"]["use-proxy-protocol"], "true", "a string: ConfigMaps hold nothing else");
    assert_ne!(ingress[0]["data"]["proxy-real-ip-cidr"], "0.0.0.0/0");
}

#[test]
fn compose_takes_the_compose_file() {
    let file = root().join("deploy/docker/compose.yaml");
    let compose = &load(&text_of("deploy/docker/compose.yaml"))[0];
    let preface = &compose["services"]["preface"];
    assert_eq!((&preface["read_only"], &preface["cap_drop"]), (&Value::from(true), &serde_json::json!(["ALL"])));
    for volume in ["preface", "nginx"].iter().flat_map(|name| compose["services"][name]["volumes"].as_array().unwrap())
    {
        let (source, _) = volume.as_str().expect("a short volume").split_once(':').expect("a source");
        assert!(file.with_file_name(source).exists(), "{source} does not exist");
    }
    let parsed = config::load(&file.with_file_name("compose/preface/preface.toml"), &Surroundings::default())
        .expect("checked above");
    let grace = preface["stop_grace_period"].as_str().and_then(|grace| grace.strip_suffix('s')?.parse().ok());
    let stopping = parsed.config.runtime.stop_delay + parsed.config.runtime.stop_timeout;
    assert!(std::time::Duration::from_secs(grace.expect("seconds")) >= stopping);
    let (status, output) = Process::run(
        Command::new(crate::support::program("docker-compose")).arg("-f").arg(&file).args(["config", "-q"]),
    );
    if output.contains("does not match the current") {
        return skip("compose_takes_the_compose_file", &output);
    }
    assert!(status.success(), "{output}");
}
