//! `deploy/prometheus`, `deploy/grafana`: the alerts do what they say, and every metric and label that they or the dashboard name exists.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use preface::termination::Termination;
use serde_json::Value;

use crate::support::receiver::say_who;
use crate::support::{Balancer, Process, Receiver, preface, program};

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy")
}

fn read(file: &str) -> String {
    let path = directory().join(file);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A balancer whose `/metrics` has a sample of every family.
fn scraped() -> (Balancer, Receiver) {
    let receiver = Receiver::with_header(say_who);
    let config = format!(
        "[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"p\"\n[pools.p]\nproxy_protocol = \"v2\"\nupstreams = [\"{}\"]\n\
         [pools.p.health_check]\n\
         [listeners.dns]\nbind = \"127.0.0.1:0\"\nprotocol = \"udp\"\npool = \"d\"\n\
         [pools.d]\nupstreams = [\"127.0.0.1:9\"]\n\
         [pools.n]\nupstreams = [\"localhost:9\"]\n",
        receiver.address
    );
    let lb = preface(&config);
    drop(lb.connect("web"));
    crate::support::eventually("the connection has ended", || {
        (lb.metric("preface_connections_ended_total", &[]) == 1.0).then_some(())
    });
    (lb, receiver)
}

#[track_caller]
fn promtool(command: &mut Command) {
    let (status, output) = Process::run(command);
    assert!(status.success(), "{output}");
}

#[test]
fn the_exposition_is_as_prometheus_wants_it() {
    let (lb, _receiver) = scraped();
    let file = lb.directory().join("metrics");
    std::fs::write(&file, lb.metrics()).expect("the metrics are written");
    // It reads standard input, and warns without failing.
    let mut shell = Command::new("sh");
    shell.arg("-c").arg("exec \"$0\" check metrics <\"$1\"").arg(program("promtool")).arg(&file);
    let (status, output) = Process::run(&mut shell);
    assert!(status.success() && output.is_empty(), "{output}");
}

#[test]
fn the_alerts_fire_when_they_should_and_only_then() {
    let mut command = Command::new(program("promtool"));
    promtool(command.current_dir(directory().join("prometheus")).args(["test", "rules", "alerts-test.yaml"]));
    let tests = read("prometheus/alerts-test.yaml");
    for line in read("prometheus/alerts.yaml").lines() {
        if let Some(alert) = line.trim().strip_prefix("- alert: ") {
            assert!(tests.contains(alert), "{alert} has no test");
        }
    }
}

/// Every expression of the dashboard, with its variables as Grafana would fill them in.
fn dashboard_expressions() -> Vec<String> {
    let dashboard: Value = serde_json::from_str(&read("grafana/dashboard.json")).expect("the dashboard is JSON");
    let mut found = Vec::new();
    collect(&dashboard, &mut found);
    assert!(found.len() > 20, "{found:?}");
    let variables = ["job", "instance", "listener", "pool"];
    let filled = |expression: String| {
        let expression = expression.replace("$__rate_interval", "5m");
        variables.iter().fold(expression, |text, variable| text.replace(&format!("${variable}"), ".*"))
    };
    found.into_iter().map(filled).collect()
}

fn collect(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(object) => {
            for (key, value) in object {
                match value {
                    Value::String(text) if key == "expr" => found.push(text.clone()),
                    // `label_values(METRIC, label)`: its metric is an expression too.
                    Value::String(text) if key == "definition" => {
                        let metric = text.strip_prefix("label_values(").and_then(|text| text.rsplit_once(','));
                        found.push(metric.expect("a variable is asked by label_values").0.to_owned());
                    }
                    value => collect(value, found),
                }
            }
        }
        Value::Array(array) => array.iter().for_each(|value| collect(value, found)),
        _ => {}
    }
}

#[test]
fn the_dashboards_expressions_are_promql() {
    let rules: String = dashboard_expressions()
        .iter()
        .enumerate()
        .map(|(index, expression)| {
            format!("  - record: dashboard:{index}\n    expr: {}\n", Value::from(expression.as_str()))
        })
        .collect();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("rules.yaml");
    std::fs::write(&file, format!("groups:\n- name: dashboard\n  rules:\n{rules}")).expect("the rules are written");
    promtool(Command::new(program("promtool")).args(["check", "rules"]).arg(&file));
}

/// Panels by their id, no two of which may be the same or lie upon another.
#[test]
fn the_dashboards_panels_have_places_of_their_own() {
    let dashboard: Value = serde_json::from_str(&read("grafana/dashboard.json")).expect("the dashboard is JSON");
    let (mut ids, mut cells) = (BTreeSet::new(), BTreeSet::new());
    for panel in dashboard["panels"].as_array().expect("panels") {
        assert!(ids.insert(panel["id"].as_u64().expect("an id")), "{}", panel["title"]);
        let number = |key: &str| panel["gridPos"][key].as_u64().expect("a number");
        for x in number("x")..number("x") + number("w") {
            for y in number("y")..number("y") + number("h") {
                assert!(x < 24 && cells.insert((x, y)), "{} lies upon another panel", panel["title"]);
            }
        }
    }
}

/// Family -> label -> the values in this scrape.
type Families = BTreeMap<String, BTreeMap<String, BTreeSet<String>>>;

fn families(metrics: &str) -> Families {
    let mut families = Families::new();
    for line in metrics.lines() {
        if let Some(family) = line.strip_prefix("# TYPE ") {
            families.insert(family.split(' ').next().unwrap_or_default().to_owned(), BTreeMap::new());
        } else if !line.starts_with('#') {
            let selector = line.rsplit_once(' ').expect("a sample").0;
            let (name, matchers) = selectors(selector).remove(0);
            let name = family_of(&name, |family| families.contains_key(family));
            for (label, value) in matchers {
                families.get_mut(&name).expect("a TYPE line").entry(label).or_default().insert(value);
            }
        }
    }
    families
}

/// The samples of a histogram have names of their own.
fn family_of(sample: &str, is_family: impl Fn(&str) -> bool) -> String {
    let stems = ["_bucket", "_sum", "_count"].iter().filter_map(|suffix| sample.strip_suffix(suffix));
    stems.into_iter().find(|stem| is_family(stem)).unwrap_or(sample).to_owned()
}

/// Metrics of ours in an expression, each with its label matchers.
fn selectors(text: &str) -> Vec<(String, Vec<(String, String)>)> {
    let is_name = |char: char| char.is_ascii_alphanumeric() || char == '_';
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find("preface_") {
        let is_whole = !rest[..at].ends_with(is_name);
        let name: String = rest[at..].chars().take_while(|char| is_name(*char)).collect();
        rest = &rest[at + name.len()..];
        let matchers = rest.strip_prefix('{').and_then(|rest| rest.split_once('}')).map_or("", |(inside, _)| inside);
        if is_whole {
            found.push((name, matchers.split("\",").filter_map(matcher).collect()));
        }
    }
    found
}

/// `why=~"a|b` without its last quote, or with it.
fn matcher(text: &str) -> Option<(String, String)> {
    let (label, value) = text.split_once('"')?;
    let label = label.trim().trim_end_matches(['=', '!', '~']);
    Some((label.to_owned(), value.trim_end_matches('"').to_owned()))
}

#[test]
fn every_metric_and_label_exists() {
    let (lb, _receiver) = scraped();
    let mut families = families(&lb.metrics());
    // In a scrape stand only the ends that there were.
    for family in ["preface_connections_ended_total", "preface_sessions_ended_total"] {
        let ended = families.get_mut(family).expect("a family");
        ended.entry("listener".to_owned()).or_default();
        for end in Termination::ALL {
            let words = [("who", end.who().as_str()), ("phase", end.phase().as_str()), ("why", end.why())];
            for (label, word) in words {
                ended.entry(label.to_owned()).or_default().insert(word.to_owned());
            }
        }
    }
    let mut texts = dashboard_expressions();
    texts.extend([read("prometheus/alerts.yaml"), read("prometheus/alerts-test.yaml")]);
    let mut used = BTreeSet::new();
    for (name, matchers) in texts.iter().flat_map(|text| selectors(text)) {
        let name = family_of(&name, |family| families.contains_key(family));
        let labels = families.get(&name).unwrap_or_else(|| panic!("/metrics has no {name}"));
        for (label, values) in matchers.iter().filter(|(label, _)| label != "job" && label != "instance") {
            let known = labels.get(label).unwrap_or_else(|| panic!("{name} has no label {label}"));
            // Names of listeners, pools, upstreams and in DNS are the operator's.
            if !["listener", "name", "pool", "upstream"].contains(&label.as_str()) {
                for value in values.split('|') {
                    assert!(known.contains(value), "{name}: no {label} is called {value:?}; there are {known:?}");
                }
            }
        }
        used.insert(name);
    }
    let unused: Vec<_> = families.keys().filter(|name| !used.contains(*name)).collect();
    assert!(unused.is_empty(), "neither an alert nor the dashboard shows {unused:?}");
}
