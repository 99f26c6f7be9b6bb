//! What kustomize and Helm make of `deploy/`, as text and as objects.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;

use crate::support::{Process, checker};

/// The chart.
pub const CHART: &str = "deploy/helm/preface";

/// Objects, and where they come from.
pub struct Rendered {
    pub from: String,
    pub text: String,
    pub objects: Vec<Value>,
}

/// The repository.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// A file of the repository.
#[track_caller]
pub fn text_of(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The documents of a YAML text.
#[track_caller]
pub fn load(text: &str) -> Vec<Value> {
    let documents: Vec<Value> =
        serde_saphyr::from_multiple(text).unwrap_or_else(|error| panic!("not YAML: {error}\n{text}"));
    documents.into_iter().filter(|document| !document.is_null()).collect()
}

/// `kubectl kustomize DIRECTORY`
#[track_caller]
pub fn kustomize(test: &str, directory: &str) -> Option<Rendered> {
    let mut command = checker(test, "kubectl")?;
    let (status, text) = Process::run(command.arg("kustomize").arg(root().join(directory)));
    assert!(status.success(), "{directory}: {text}");
    Some(Rendered { from: directory.to_owned(), objects: load(&text), text })
}

/// `helm template preface CHART`, with the values of a scenario.
#[track_caller]
pub fn helm(test: &str, scenario: Option<&str>) -> Option<Rendered> {
    let mut command = checker(test, "helm")?;
    command.args(["template", "preface"]).arg(root().join(CHART)).args(["--namespace", "preface"]);
    if let Some(scenario) = scenario {
        command.arg("--values").arg(values_of(scenario));
    }
    let output = command.output().expect("helm runs");
    let text = String::from_utf8(output.stdout).expect("YAML is text");
    let from = format!("the chart with {}", scenario.unwrap_or("its defaults"));
    assert!(output.status.success(), "{from}: {}", String::from_utf8_lossy(&output.stderr));
    Some(Rendered { from, objects: load(&text), text })
}

/// The values of a scenario.
pub fn values_of(scenario: &str) -> PathBuf {
    root().join(CHART).join("ci").join(format!("{scenario}-values.yaml"))
}

/// Kind and name.
pub fn identity(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    format!("{} {}", text(&object["kind"]), text(&object["metadata"]["name"]))
}

/// In one order, without the labels that only Helm gives.
pub fn comparable(mut objects: Vec<Value>) -> Vec<Value> {
    objects.iter_mut().for_each(without_labels_of_helm);
    objects.sort_by_key(identity);
    objects
}

fn without_labels_of_helm(value: &mut Value) {
    match value {
        Value::Object(map) => {
            for label in ["instance", "version", "managed-by"] {
                map.remove(&format!("app.kubernetes.io/{label}"));
            }
            map.remove("helm.sh/chart");
            map.values_mut().for_each(without_labels_of_helm);
        }
        Value::Array(array) => array.iter_mut().for_each(without_labels_of_helm),
        _ => {}
    }
}
