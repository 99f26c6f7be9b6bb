//! What an operator sees: the shape of `/status` and `/history`, and that their numbers are those of the traffic.

use std::io::{Read, Write};

use serde_json::{Map, Value};

use crate::support::receiver::say_who;
use crate::support::{Balancer, Receiver, eventually, preface};

fn config(upstream: &Receiver, more: &str) -> String {
    format!(
        "[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"p\"\n\
         [pools.p]\nproxy_protocol = \"v2\"\nupstreams = [\"{}\"]\n{more}",
        upstream.address
    )
}

/// One connection from beginning to end.
fn exchange(lb: &Balancer) -> String {
    let mut client = lb.connect("web");
    client.write_all(b"hello").expect("it is sent");
    client.shutdown(std::net::Shutdown::Write).expect("it is closed");
    let mut answer = String::new();
    client.read_to_string(&mut answer).expect("an answer");
    answer
}

/// Names and types: what a program that reads it relies on. Of an array the first element.
fn shape(value: &Value) -> Value {
    match value {
        Value::Object(object) => {
            Value::Object(object.iter().map(|(key, value)| (key.clone(), shape(value))).collect::<Map<_, _>>())
        }
        Value::Array(array) => Value::Array(array.iter().rev().take(1).map(shape).collect()),
        Value::String(_) => "text".into(),
        Value::Number(_) => "number".into(),
        Value::Bool(_) => "bool".into(),
        Value::Null => Value::Null,
    }
}

fn column(history: &Value, path: &str) -> Vec<Value> {
    history.pointer(path).and_then(Value::as_array).unwrap_or_else(|| panic!("no {path}: {history:#}")).clone()
}

#[test]
fn the_status_has_rates_percentiles_and_ends() {
    let receiver = Receiver::with_header(say_who);
    let lb = preface(&config(&receiver, "[pools.p.health_check]\n"));
    exchange(&lb);
    let status = eventually("the connection is measured and checked", || {
        let status = lb.status();
        let pool = &status["pools"]["p"];
        let measured = pool["latency"]["duration_ms"]["last_minute"]["count"] == 1
            && pool["latency"]["health_check_ms"]["since_start"]["count"].as_u64() > Some(0)
            && pool["upstreams"][0]["latency"]["first_byte_ms"]["since_start"]["count"] == 1
            && status["ends"]["last_10m"] == status["ends"]["total"];
        measured.then_some(status)
    });
    let text = format!("{:#}", shape(&status)).replace(&receiver.address.to_string(), "ADDRESS");
    insta::assert_snapshot!(text);
    let times = &status["pools"]["p"]["latency"]["duration_ms"]["last_minute"];
    assert!(times["p50"].as_f64() > Some(0.0) && times["p50"] == times["max"], "{times}");
}

#[test]
fn the_history_has_a_column_for_each_number() {
    let receiver = Receiver::with_header(say_who);
    let lb = preface(&config(&receiver, ""));
    for _ in 0..3 {
        exchange(&lb);
    }
    let history = eventually("the connections are in a point", || {
        let history: Value = lb.ask("GET", "/history").json();
        let seen = column(&history, "/listeners/web/connections_per_s").iter().any(|rate| rate.as_f64() > Some(0.0));
        seen.then_some(history)
    });
    let text = format!("{:#}", shape(&history)).replace(&receiver.address.to_string(), "ADDRESS");
    insta::assert_snapshot!(text);
    let length = column(&history, "/times").len();
    let upstream = format!("/pools/p/upstreams/{}", receiver.address);
    for path in ["/process", "/listeners/web", "/pools/p", &upstream] {
        assert_eq!(column(&history, &format!("{path}/bytes_out_per_s")).len(), length, "{path}");
    }
    assert_eq!(column(&history, "/pools/p/duration_ms/p99").len(), length);
    let of_upstream = column(&history, &format!("{upstream}/connect_ms/max"));
    assert!(of_upstream.iter().any(|max| max.as_f64() > Some(0.0)), "{of_upstream:?}");
}
