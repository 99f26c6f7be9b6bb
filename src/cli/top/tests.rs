//! The screen of `preface top` as it looks, and what keys do to it. No terminal, no server.

use ratatui::Terminal;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use serde_json::json;

use super::model::Model;
use super::view::{Action, Mode, Order, Sort, Target, View};
use super::*;

fn upstream(address: &str, health: &str, reason: &str, admin: &str, per_second: f64) -> Value {
    let latency = json!({ "count": 10, "p50": per_second / 100.0, "p99": per_second / 4.0 });
    let ordered = (admin != "enabled").then_some("2026-11-21T04:30:00.000Z");
    json!({
        "address": address, "health": health, "health_reason": reason, "health_since": "2026-11-21T04:26:00.000Z",
        "admin": admin, "admin_since": ordered, "admin_by": ordered.map(|_| "command line"),
        "header": "v2", "open": (per_second * 3.0) as u64, "connect_failures": if health == "unhealthy" { 31 } else { 0 },
        "rates": {
            "connections_per_s": per_second, "failures_per_s": if health == "unhealthy" { 2.4 } else { 0.0 },
            "bytes_in_per_s": per_second * 700.0, "bytes_out_per_s": per_second * 90_000.0,
        },
        "latency": { "connect_ms": { "last_minute": latency }, "first_byte_ms": { "last_minute": latency } },
    })
}

fn slow(mut upstream: Value) -> Value {
    upstream["slow"] = json!({ "phase": "first_byte" });
    upstream
}

fn status() -> Value {
    let rates = json!({
        "connections_per_s": 536.2, "failures_per_s": 2.0, "bytes_in_per_s": 380e3, "bytes_out_per_s": 48.1e6
    });
    let none =
        json!({ "connections_per_s": 0.0, "failures_per_s": 0.0, "bytes_in_per_s": 0.0, "bytes_out_per_s": 0.0 });
    json!({
        "version": "0.1.0", "state": "running", "time": "2026-11-21T04:38:07.120Z", "started": "2026-11-18T02:00:00.000Z",
        "connections": { "open": 1609, "max": 9695 }, "rates": rates,
        "pools": {
            "ingress": { "usable": true, "rates": rates, "upstreams": [
                slow(upstream("10.0.0.30:80", "healthy", "200 OK in 1.2 ms", "enabled", 412.0)),
                upstream("10.0.0.31:80", "unhealthy", "connection refused", "enabled", 0.0),
                upstream("10.0.0.32:80", "healthy", "200 OK in 0.9 ms", "draining", 0.3),
                upstream("[2001:db8:85a3::8a2e:370:7334]:8080", "healthy", "200 OK in 1.1 ms", "enabled", 124.0),
            ] },
            "mail": { "usable": false, "rates": none, "upstreams": [
                upstream("10.0.0.50:10025", "unhealthy", "no answer within 2 s", "enabled", 0.0),
            ] },
        },
        "problems": [
            problem("bad", [Some("mail"), None], "takes no connections", None, "mend one of its upstreams, see below"),
            problem("bad", [None, None], "the last reload was refused", Some("2026-11-21T04:36:00.000Z"), "correct the file"),
            problem(
                "bad",
                [Some("ingress"), Some("10.0.0.30:80")],
                "slow to first byte: 101 ms, its siblings 1.1 ms, itself 1.2 ms before",
                Some("2026-11-21T04:37:00.000Z"),
                "its connects are as quick as ever, so it is the application there: its load, its log, what it waits for",
            ),
            problem(
                "bad",
                [Some("ingress"), Some("10.0.0.31:80")],
                "unhealthy: connection refused",
                Some("2026-11-21T04:26:00.000Z"),
                "nothing listens on that address and port",
            ),
            problem(
                "warn",
                [Some("ingress"), Some("10.0.0.32:80")],
                "draining by command line, 0 open",
                Some("2026-11-21T04:30:00.000Z"),
                "`preface enable ingress 10.0.0.32:80`",
            ),
        ],
    })
}

fn problem(severity: &str, place: [Option<&str>; 2], what: &str, since: Option<&str>, advice: &str) -> Value {
    let [pool, upstream] = place;
    json!({ "severity": severity, "pool": pool, "upstream": upstream, "what": what, "since": since, "advice": advice })
}

/// The screen as text.
fn screen(scene: &Scene, width: u16, height: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw::draw(scene, frame.area(), frame.buffer_mut())).unwrap();
    terminal.backend().to_string()
}

fn shown(model: &Model, view: &View, width: u16, height: u16) -> String {
    screen(&Scene { model: Some(model), address: "127.0.0.1:9900", silence: None, view }, width, height)
}

fn press(view: &mut View, model: &Model, keys: &str) -> Option<Action> {
    let mut action = None;
    for key in keys.chars() {
        let code = match key {
            '\n' => KeyCode::Enter,
            '\x1b' => KeyCode::Esc,
            '\x08' => KeyCode::Backspace,
            key => KeyCode::Char(key),
        };
        action = view.key(KeyEvent::new(code, KeyModifiers::NONE), model);
    }
    action
}

#[test]
fn fits_a_terminal_of_80_by_24() {
    let model = Model::of_status(&status());
    let mut view = View::default();
    insta::assert_snapshot!(shown(&model, &view, 80, 24));
    press(&mut view, &model, "jj");
    insta::assert_snapshot!("two_down", shown(&model, &view, 80, 24));
}

/// A DNS pool behind a listener of both: what it asks over UDP is much more.
fn dns() -> Value {
    let mut status = status();
    status["rates"]["datagrams_in_per_s"] = json!(5200.0);
    status["rates"]["datagrams_out_per_s"] = json!(5150.4);
    let mut one = upstream("10.0.0.53:53", "healthy", "answered in 0.4 ms", "enabled", 5200.0);
    one["latency"] = json!({ "round_trip_ms": { "last_minute": { "count": 9, "p50": 0.31, "p99": 12.4 } } });
    let mut both = upstream("10.0.0.54:53", "healthy", "answered in 0.5 ms", "enabled", 40.0);
    both["latency"]["round_trip_ms"] = json!({ "last_minute": { "count": 9, "p50": 0.2, "p99": 800.0 } });
    status["pools"]["resolvers"] = json!({ "usable": true, "upstreams": [one, both] });
    status
}

#[test]
fn sessions_stand_in_the_same_table() {
    let model = Model::of_status(&dns());
    let mut view = View::default();
    press(&mut view, &model, "/resolvers\n");
    insta::assert_snapshot!("udp", shown(&model, &view, 120, 20));
    press(&mut view, &model, "j");
    insta::assert_snapshot!("udp_details", shown(&model, &view, 120, 20));
    press(&mut view, &model, "j");
    insta::assert_snapshot!("udp_and_tcp_details", shown(&model, &view, 120, 20));
}

#[test]
fn the_chosen_row_opens_with_every_figure_of_its_times() {
    let figures = |first: f64| json!({ "count": 9, "p50": first, "p90": first * 1.5, "p99": first * 4.0, "p999": first * 90.0, "max": first * 2000.0 });
    let both = |first: f64| json!({ "last_minute": figures(first), "since_start": figures(first * 3.0) });
    let mut status = dns();
    let upstreams = &mut status["pools"]["ingress"]["upstreams"];
    upstreams[0]["latency"] =
        json!({ "connect_ms": both(0.029), "first_byte_ms": both(1.2), "duration_ms": both(31.5) });
    upstreams[1]["latency"] = json!({ "connect_ms": { "last_minute": null, "since_start": figures(0.3) } });
    upstreams[2]["latency"] = json!({ "connect_ms": { "last_minute": null, "since_start": null } });
    status["pools"]["resolvers"]["upstreams"][0]["latency"] =
        json!({ "round_trip_ms": both(0.4), "session_ms": both(5000.0) });
    let model = Model::of_status(&status);
    let mut view = View::default();
    // Below the table, without the keys' line.
    let foot = |view: &View| {
        let text = shown(&model, view, 80, 40);
        let lines =
            text.lines().skip_while(|line| !line.starts_with("\"ingress 1") && !line.starts_with("\"resolvers 1"));
        lines.collect::<Vec<_>>().join("\n")
    };
    press(&mut view, &model, "jl");
    let mut shown = vec![foot(&view)];
    for keys in ["j", "j", "jjjjj"] {
        press(&mut view, &model, keys);
        shown.push(foot(&view));
    }
    insta::assert_snapshot!("times", shown.join("\n\n"));
    press(&mut view, &model, "\n");
    assert!(!view.is_open);
}

#[test]
fn a_wider_terminal_shows_more() {
    let model = Model::of_status(&status());
    insta::assert_snapshot!(shown(&model, &View::default(), 140, 20));
}

#[test]
fn questions_filter_and_help_say_what_keys_mean() {
    let model = Model::of_status(&status());
    let mut view = View::default();
    press(&mut view, &model, "jd");
    let last = |view: &View| shown(&model, view, 80, 24).lines().last().unwrap().to_owned();
    let mut lines = vec![last(&view)];
    press(&mut view, &model, "nkx");
    lines.push(last(&view));
    press(&mut view, &model, "n/unh");
    lines.push(last(&view));
    press(&mut view, &model, "\ns");
    lines.push(last(&view));
    view.said = Some(Err("not done: no pool named \"mail\"".to_owned()));
    lines.push(last(&view));
    insta::assert_snapshot!(lines.join("\n"));
    press(&mut view, &model, "?");
    insta::assert_snapshot!("help", shown(&model, &view, 80, 24));
}

#[test]
fn a_process_that_is_gone_is_said_and_what_was_known_stays() {
    let view = View::default();
    let why = "no preface answers on 127.0.0.1:9900 (from --admin): Connection refused";
    let scene = Scene { model: None, address: "127.0.0.1:9900", silence: Some((why, 3)), view: &view };
    insta::assert_snapshot!(screen(&scene, 80, 6));
    let model = Model::of_status(&status());
    let text = screen(&Scene { model: Some(&model), ..scene }, 80, 24);
    assert!(text.contains("no answer for 3s: no preface answers") && text.contains("10.0.0.30:80"), "{text}");
}

#[test]
fn a_small_terminal_or_a_status_of_another_version_breaks_nothing() {
    for status in [status(), json!({}), json!([]), json!({ "pools": { "p": { "upstreams": [{}] } }, "reloads": 7 })] {
        let model = Model::of_status(&status);
        for (width, height) in [(1, 1), (10, 3), (30, 8), (79, 23), (300, 100)] {
            let mut view = View::default();
            shown(&model, &view, width, height);
            press(&mut view, &model, "GsssssGd?");
            shown(&model, &view, width, height);
        }
    }
}

#[test]
fn names_cannot_move_the_cursor() {
    let model = Model::of_status(&json!({
        "pools": { "a\x1b[2Jb": { "upstreams": [
            upstream("x\r\ny", "unhealthy", "bad\x07 \u{9b}1m", "enabled", 1.0),
        ] } },
        "problems": [problem("bad", [Some("a\x1b[2Jb"), Some("x\r\ny")], "bad\x07", Some("soon"), "\u{9b}1m")],
    }));
    let text = shown(&model, &View::default(), 100, 20);
    assert!(text.chars().all(|c| c == '\n' || !c.is_control()), "{text:?}");
}

#[test]
fn an_order_is_given_after_a_yes_to_the_row_that_was_chosen() {
    let model = Model::of_status(&status());
    let mut view = View::default();
    let of = |address: Option<&str>| Target { pool: "ingress".to_owned(), address: address.map(str::to_owned) };
    assert_eq!(press(&mut view, &model, "jd"), None);
    assert_eq!(view.mode, Mode::Confirm(Order::Drain, of(Some("10.0.0.30:80"))));
    assert_eq!(press(&mut view, &model, "d"), None, "neither yes nor no");
    assert_eq!(press(&mut view, &model, "y"), Some(Action::Give(Order::Drain, of(Some("10.0.0.30:80")))));
    assert_eq!(press(&mut view, &model, "xn"), None);
    assert_eq!(view.mode, Mode::Rows);
    assert_eq!(
        press(&mut view, &model, "ge\n"),
        Some(Action::Give(Order::Enable, of(None))),
        "a pool's row: all of it"
    );
    assert_eq!(press(&mut view, &model, "dq"), None, "a question is refused before anything ends");
    assert_eq!(press(&mut view, &model, "q"), Some(Action::Quit));
    let interrupt = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    view.mode = Mode::Filter;
    assert_eq!(view.key(interrupt, &model), Some(Action::Quit));
}

#[test]
fn rows_are_sorted_and_filtered_and_the_chosen_one_stays_chosen() {
    let model = Model::of_status(&status());
    let mut view = View::default();
    let addresses = |view: &View| -> Vec<String> {
        view.rows(&model).iter().map(|row| row.target().address.unwrap_or_else(|| row.target().pool)).collect()
    };
    assert_eq!(addresses(&view)[..2], ["ingress", "10.0.0.30:80"]);
    press(&mut view, &model, "jjj");
    assert_eq!(view.selected_index(&view.rows(&model)), 3);
    press(&mut view, &model, "s");
    assert_eq!(view.sort, Sort::State);
    assert_eq!(addresses(&view)[..4], ["10.0.0.31:80", "10.0.0.50:10025", "10.0.0.30:80", "10.0.0.32:80"]);
    assert_eq!(view.selected_index(&view.rows(&model)), 3, "10.0.0.32:80 as before");
    press(&mut view, &model, "sssss");
    assert_eq!(view.sort, Sort::Pool);
    for (typed, rows) in [
        ("/healthy\n", 4), // with their pool; not the unhealthy ones
        ("/\x1b/UNHEALTHY\n", 4),
        ("/\x1b/2001:db8\n", 2),
        ("/\x1b/mail\n", 2),
        ("/\x1b/draining\n", 2),
        ("/\x1b/refused\n", 2),
        ("/\x1b/mailx\x08\n", 2),
        ("/\x1b/nothing\n", 0),
        ("\x1b", 7),
    ] {
        press(&mut view, &model, typed);
        assert_eq!(view.rows(&model).len(), rows, "{typed:?}");
    }
}

#[test]
fn one_frame_is_text_without_keys() {
    insta::assert_snapshot!(frame(&Model::of_status(&status()), "unix:/run/preface/admin.sock"));
}
