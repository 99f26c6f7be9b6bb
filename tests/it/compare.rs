//! `benches/compare` with hardly any work: does it start the candidates, find out wrong headers, and write its files?
//! Its figures mean nothing here.

#[allow(dead_code, reason = "the program around it is built as a bench")]
#[path = "../../benches/compare/main.rs"]
mod harness;

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use harness::measure::{Gauge, quantile};
use harness::peers::Kind;
use harness::report::{Spread, number};
use harness::rows;
use harness::wire::{AddressBook, REQUEST_BYTES, Request};
use harness::{Options, compare};

use crate::support::eventually;

/// Runs it as the command would, and answers with what failed.
fn smoke(words: &[&str], output: &Path) -> Vec<String> {
    let common = ["--smoke", "--preface", env!("CARGO_BIN_EXE_preface"), "--output", output.to_str().unwrap()];
    let options = Options::from_words(&[&common[..], words].concat()).unwrap();
    compare(&options, &words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>()).unwrap()
}

fn json(output: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(output.join("results.json")).unwrap()).unwrap()
}

#[test]
fn every_kind_of_work_is_done_and_written_down() {
    let output = tempfile::tempdir().unwrap();
    let tcp = ["bulk-16-up", "bulk-1-down", "pingpong-64-64", "short-16", "idle", "reload", "scaling-bulk-16"];
    let watched = ["watched-pingpong-64-64", "watched-short-16"];
    let kinds = [&tcp[..], &watched, &["udp-oneway-16", "udp-crowded-echo-16", "udp-echo-1000"]].concat();
    let only = "direct,preface,preface-log-on,preface-watched";
    let failed = smoke(&["--rows", &kinds.join(","), "--only", only], output.path());
    assert!(failed.is_empty(), "{failed:?}");

    let json = json(output.path());
    let rows = json["rows"].as_array().unwrap();
    assert_eq!(rows.len(), kinds.len());
    for row in rows {
        let row_name = row["name"].as_str().unwrap();
        for candidate in row["candidates"].as_array().unwrap() {
            let sample = &candidate["samples"][0];
            let figure = match row_name {
                // So few fit into what is allocated already: their memory may come to nothing, or less.
                "idle" => "connections",
                "reload" => "during_p99",
                _ if candidate["name"] == "direct" => "rate",
                _ => "cpu",
            };
            assert!(sample[figure].as_f64().unwrap() > 0.0, "{row_name}: {candidate}");
            assert!(row_name != "reload" || sample["failed"] == 0.0, "{candidate}");
            let works = |name: &str| row_name.contains(name) && candidate["name"].as_str().unwrap().contains("preface");
            if works("pingpong-64") || works("short") {
                assert!(sample["workers"].as_f64() > Some(0.0), "{candidate}");
            }
        }
    }

    let table = fs::read_to_string(output.path().join("table.md")).unwrap();
    let plot = fs::read_to_string(output.path().join("plot.svg")).unwrap();
    for row in rows {
        let title = row["title"].as_str().unwrap();
        assert!(table.contains(&format!("## {title}\n")), "{table}");
        assert!(plot.contains(&format!(">{title}<")), "{plot}");
    }
    for comparison in ["connection log on / off", "watched / not watched: the workers"] {
        assert!(table.contains(&format!("| {comparison} |")), "{table}");
    }
    assert!(plot.starts_with("<svg ") && plot.ends_with("</svg>\n"), "{plot}");
    assert_eq!(plot.matches("<text ").count(), plot.matches("</text>").count());
    assert!(!plot.contains("NaN"), "{plot}");
}

#[test]
fn a_candidate_that_sends_no_header_or_does_not_start_is_said_to_have_failed() {
    let output = tempfile::tempdir().unwrap();
    let words = ["--rows", "short-16", "--only", "preface,envoy,headerless", "--envoy", "/does/not/exist"];
    let mut failed = smoke(&words, output.path());
    failed.sort();
    let [envoy, headerless] = failed.as_slice() else { panic!("{failed:?}") };
    assert!(envoy.starts_with("short-16: Envoy: /does/not/exist: No such file"), "{envoy}");
    assert!(headerless.starts_with("short-16: headerless: no valid header: "), "{headerless}");

    let json = json(output.path());
    let candidates = json["rows"][0]["candidates"].as_array().unwrap();
    let succeeded: Vec<&Value> = candidates.iter().filter(|candidate| candidate["failure"].is_null()).collect();
    assert_eq!(succeeded.len(), 1, "{candidates:?}");
    assert_eq!((&succeeded[0]["name"], &succeeded[0]["header"]), (&"preface".into(), &"v2".into()));
    let table = fs::read_to_string(output.path().join("table.md")).unwrap();
    assert!(table.contains("| headerless | failed: no valid header: "), "{table}");
}

#[test]
fn a_datagram_without_a_header_is_found_out() {
    let output = tempfile::tempdir().unwrap();
    let failed = smoke(&["--rows", "udp-oneway-16,udp-echo-16", "--only", "headerless"], output.path());
    let [one_way, echo] = failed.as_slice() else { panic!("{failed:?}") };
    assert!(one_way.starts_with("udp-oneway-16: headerless: no valid header: "), "{one_way}");
    assert!(echo.starts_with("udp-echo-16: headerless: no valid header: "), "{echo}");
}

#[test]
fn words_that_name_nothing_are_an_error_that_says_what_there_is() {
    let error = |words: &[&str]| {
        let common = ["--smoke", "--preface", env!("CARGO_BIN_EXE_preface")];
        let options = Options::from_words(&[&common[..], words].concat()).unwrap();
        compare(&options, &[]).unwrap_err().to_string()
    };
    assert!(error(&["--rows", "bulky"]).starts_with("no row named \"bulky\"; there are: bulk-1-up, "));
    assert!(error(&["--only", "traefik"]).starts_with("no candidate named \"traefik\"; there are: direct, preface, "));
}

#[test]
fn requests_come_back_as_they_were() {
    for request in [Request::Echo, Request::Sink(7), Request::Source(1 << 40), Request::Short] {
        assert_eq!(Request::decode(&request.encode()), Some(request));
    }
    assert_eq!(Request::decode(&[0; REQUEST_BYTES]), None);
}

#[test]
fn an_address_is_good_for_one_header_and_no_other_address_is() {
    let book = AddressBook::default();
    let (used, other) = (AddressBook::address(12_345), AddressBook::address(12_346));
    book.enter(used);
    assert!(!book.take(other));
    assert!(!book.take("127.0.0.1:40000".parse().unwrap()));
    assert!(!book.take("192.0.2.1:40000".parse().unwrap()));
    assert!(book.take(used));
    assert!(!book.take(used), "a second header with it");
}

#[test]
fn quantiles_are_values_that_occurred() {
    let mut values: Vec<u64> = (1..=1000).rev().collect();
    assert_eq!(quantile(&mut values, 0.5), 500.0);
    assert_eq!(quantile(&mut values, 0.99), 990.0);
    assert_eq!(quantile(&mut values, 0.999), 999.0);
    assert_eq!(quantile(&mut [7], 0.999), 7.0);
    assert!(quantile(&mut [], 0.5).is_nan());
}

#[test]
fn work_shows_in_the_processor_time() {
    let mut worker = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
    let gauge = Gauge { pids: vec![worker.id()] };
    let meter = gauge.start().unwrap();
    let worked = || gauge.threads("sh").unwrap().iter().sum::<u64>();
    let begun = worked();
    eventually("30 ms of work", || (worked() - begun > 30_000_000).then_some(()));
    let usage = meter.stop().unwrap();
    let memory = gauge.memory_kib().unwrap();
    worker.kill().unwrap();
    worker.wait().unwrap();
    assert!(usage.candidate > 0.02 && usage.wall > 0.0, "{usage:?}");
    assert!(memory > 0.0);
}

#[test]
fn the_median_is_in_the_middle() {
    let spread = |values: &[f64]| Spread::of(values.to_vec());
    assert_eq!(spread(&[3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
    assert_eq!(spread(&[4.0, 1.0, 2.0, 3.0]).unwrap().median, 2.5);
    assert_eq!(spread(&[]), None);
    assert_eq!(spread(&[f64::NAN]), None);
}

#[test]
fn numbers_are_as_long_as_they_mean_something() {
    let written = [0.0, 0.01234, 0.1548, 1.0, 9.876_5, 12.34, 1234.6].map(number);
    assert_eq!(written, ["0", "0.0123", "0.155", "1", "9.88", "12.3", "1235"]);
}

#[test]
fn candidates_are_found_by_their_words() {
    assert_eq!(Kind::matching("preface"), [Kind::Preface]);
    assert_eq!(Kind::matching("preface-log-on"), [Kind::PrefaceLog]);
    assert_eq!(Kind::matching("preface-watched"), [Kind::Watched]);
    assert_eq!(Kind::matching("haproxy"), [Kind::Haproxy, Kind::HaproxyTuned]);
    assert_eq!(Kind::matching("nginx-tuned"), [Kind::NginxTuned]);
    assert_eq!(Kind::matching("bare"), [Kind::Bare]);
    assert!(Kind::matching("traefik").is_empty());
}

#[test]
fn rows_have_names_of_their_own_and_targets_that_can_be_computed() {
    let rows = rows::all(4);
    for (at, row) in rows.iter().enumerate() {
        assert!(rows[at + 1..].iter().all(|other| other.name != row.name), "{}", row.name);
        let takes_part = |kind: &Kind| row.contestants.iter().any(|contestant| contestant.kind == *kind);
        let has = |key: &str| row.work.metrics().iter().any(|metric| metric.key == key);
        for target in &row.targets {
            assert!(takes_part(&target.of) && target.against.iter().all(takes_part), "{}: {target:?}", row.name);
            assert!(has(target.key) && has(target.against_key), "{}: {target:?}", row.name);
        }
    }
    assert_eq!(rows.last().unwrap().contestants.len(), 3, "1, 2 and 4 workers");
}
