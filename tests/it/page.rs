//! The status page in a real browser: what it shows, that it stays up to date, and that its buttons do what they say.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::path::Path;

use crate::reload::list;
use crate::support::browser::{Browser, forward_to};
use crate::support::datagrams::{DatagramServer, ask, client, echo};
use crate::support::ports::free_port;
use crate::support::receiver::say_who;
use crate::support::{Balancer, Receiver, eventually, preface};

/// One connection from beginning to end.
fn exchange(balancer: &Balancer, listener: &str) {
    let mut client = balancer.connect(listener);
    client.write_all(b"hello").expect("it is sent");
    client.shutdown(Shutdown::Write).expect("it is closed");
    client.read_to_end(&mut Vec::new()).expect("an answer");
}

/// The page through a tunnel, as an operator opens it.
fn open(balancer: &Balancer) -> Browser {
    let browser = Browser::start();
    browser.open(&format!("http://localhost:{}/", forward_to(balancer.admin_socket())));
    browser.wait_for("#live", "live", |text| text.starts_with("live "));
    browser
}

/// A pool that serves behind a listener, and one of which an upstream is down.
fn config(serving: &Receiver, dead: u16, more: &str) -> String {
    format!(
        "[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"ingress\"\n\
         [pools.ingress]\nproxy_protocol = \"v2\"\nupstreams = {}\n\
         [pools.down]\nupstreams = [\"127.0.0.1:{dead}\"]\n[pools.down.health_check]\n{more}",
        list([serving.address].into_iter())
    )
}

#[test]
fn shows_what_there_is_and_what_happens() {
    let receiver = Receiver::with_header(say_who);
    let dead = free_port();
    let mut balancer = preface(&config(&receiver, dead, ""));
    let browser = open(&balancer);
    let pools = browser.wait_for("#pools", "the upstream that is down", |text| text.contains("unhealthy"));
    for part in ["Pool ingress", &receiver.address.to_string(), "Pool down", &format!("127.0.0.1:{dead}")] {
        assert!(pools.contains(part), "no {part} in {pools}");
    }
    let problems = browser.text("#problems");
    assert!(problems.contains(&format!("down 127.0.0.1:{dead}")) && problems.contains("refused"), "{problems}");

    for _ in 0..3 {
        exchange(&balancer, "web");
    }
    browser.wait_for("#listeners", "three accepted", |text| text.contains("v2 3"));
    // Who closed first depends on who was faster.
    let closed = |text: &str| -> u32 {
        let rows = text.lines().filter(|line| line.contains("relay.closed"));
        rows.filter_map(|row| row.split('\t').next_back()?.trim().parse::<u32>().ok()).sum()
    };
    browser.wait_for("#ends", "the ends and their counts", |text| closed(text) == 3);
    browser.wait_for("#pools", "a percentile", |text| text.contains(" ms"));
    let drawn = "return document.querySelector('#listeners polyline').getAttribute('points').split(' ').length > 1";
    eventually("the plot has a line", || (browser.run(drawn) == true).then_some(()));

    // The header of a connection, field by field.
    browser.wait_for("#tap", "three connections", |text| text.matches("v2, ").count() == 3);
    browser.click("#tap tbody button");
    let header = browser.wait_for("#tap .detail", "the signature", |text| text.contains("0d 0a 0d 0a 00 0d 0a"));
    let client = receiver.arrivals().last().expect("three came").client().to_string();
    assert!(header.contains(&client), "{client} is not in {header}");

    // What a reload changed, and why one was refused.
    balancer.apply(&config(&receiver, dead, "interval = \"2s\"\n"));
    browser.wait_for("#reloads", "a reload", |text| text.contains("applied") && text.contains("health_check"));
    balancer.rewrite_config("[listeners.web]\nbind = 7 # <img src=x onerror=alert(1)>\n");
    browser.wait_for("#problems", "the refused reload", |text| text.contains("was refused"));
    browser.wait_for("#reloads", "its errors", |text| text.contains("refused") && text.contains("<img src=x"));
    assert_eq!(browser.run("return document.images.length"), 0, "what the file says is text, not HTML");
    assert_eq!(browser.console(), Vec::<String>::new());
}

#[test]
fn shows_udp_sessions_in_the_same_tables() {
    let server = DatagramServer::start(echo);
    let balancer = preface(&format!(
        "[listeners.dns]\nbind = \"127.0.0.1:0\"\nprotocol = \"udp\"\npool = \"resolvers\"\nidle_timeout = \"300ms\"\n\
         [pools.resolvers]\nproxy_protocol = \"spp\"\nupstreams = [\"{}\"]\n",
        server.address
    ));
    let browser = open(&balancer);
    browser.wait_for("#pools", "the column of round trips", |text| text.to_lowercase().contains("udp round trip"));
    assert!(!browser.text("#pools").to_lowercase().contains("first byte"), "no connection comes here");
    let client = client();
    for _ in 0..3 {
        ask(&client, balancer.ipv4("dns"), b"question");
    }
    client.send_to(&[0; 65_507], balancer.ipv4("dns")).expect("a datagram is sent");
    browser.wait_for("#pools", "a percentile", |text| text.contains(" ms"));
    browser.wait_for("#listeners", "the drop and why", |text| text.contains("too_big 1") && text.contains("spp 3"));
    browser.wait_for("#problems", "the drop", |text| text.contains("listener dns") && text.contains("too_big 1"));
    browser.wait_for("#ends", "the end of the session", |text| text.contains("UDP preface.relay.idle_timeout"));
    browser.wait_for("#tap", "the session", |text| text.contains("dns (UDP)") && text.contains("spp, 38 bytes"));
    let plots = "return [...document.querySelectorAll('#listeners svg.plot polyline')].filter((line) => line.getAttribute('points')).length";
    eventually("sessions, datagrams and drops are drawn", || (browser.run(plots) == 3).then_some(()));
    browser.click("#tap tbody button");
    let header = browser.wait_for("#tap .detail", "the magic", |text| text.contains("56 ec"));
    assert!(header.contains(&client.local_addr().expect("an address").to_string()), "{header}");
    assert_eq!(browser.console(), Vec::<String>::new());
}

/// How bright an element's own background is, from 0 to 255; one that is transparent has none.
#[track_caller]
fn brightness(browser: &Browser, selector: &str) -> f64 {
    let body = format!("return getComputedStyle(document.querySelector({selector:?})).backgroundColor");
    let colour = browser.run(&body).as_str().expect("a colour").to_owned();
    let parts = colour.strip_prefix("rgb(").and_then(|rest| rest.strip_suffix(')'));
    let parts = parts.unwrap_or_else(|| panic!("{selector} is not filled: {colour}")).split(", ");
    parts.map(|part| part.parse::<f64>().expect("a number")).sum::<f64>() / 3.0
}

/// Nothing must be reached by scrolling sideways.
#[track_caller]
fn assert_fits(browser: &Browser, what: &str) {
    let widths = browser.run("return [innerWidth, document.documentElement.scrollWidth]");
    let [window, content]: [u32; 2] = serde_json::from_value(widths).expect("two numbers");
    assert!(window == 390 && content <= window, "{what}: {content} pixels in {window}");
}

#[test]
fn fits_a_phone_in_light_and_in_dark() {
    let receiver = Receiver::with_header(say_who);
    let dead = free_port();
    let balancer = preface(&config(&receiver, dead, ""));
    exchange(&balancer, "web");
    let browser = Browser::start();
    let mut pages = Vec::new();
    for colours in ["light", "dark"] {
        browser.emulate(390, 844, colours);
        browser.open(&format!("http://localhost:{}/", forward_to(balancer.admin_socket())));
        browser.wait_for("#live", "live", |text| text.starts_with("live "));
        browser.wait_for("#problems", "the upstream that is down", |text| text.contains("refused"));
        browser.wait_for("#tap", "the connection", |text| text.contains("v2, "));
        assert_fits(&browser, colours);
        // What opens, too: a question, the bytes of a header.
        browser.click(&format!("tr[data-address='{}'] [data-order=drain]", receiver.address));
        browser.wait_for("dialog[open]", "the question", |text| text.contains("Drain "));
        assert_fits(&browser, "a question");
        browser.click("dialog [value=no]");
        browser.click("#tap tbody button");
        browser.wait_for("#tap .detail", "the signature", |text| text.contains("0d 0a 0d 0a 00 0d 0a"));
        assert_fits(&browser, "a header");
        let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("page-390-{colours}.png"));
        browser.run("scrollTo(0, 0)");
        browser.screenshot(&file);
        assert_eq!(browser.console(), Vec::<String>::new());
        let png = std::fs::read(&file).expect("it was written");
        assert!(png.starts_with(b"\x89PNG\r\n\x1a\n"), "{} is no PNG", file.display());
        pages.push((["body", "header"].map(|selector| brightness(&browser, selector)), png));
    }
    let [(light, light_png), (dark, dark_png)] = <[_; 2]>::try_from(pages).expect("two");
    assert!(light.iter().all(|fill| *fill > 200.0) && dark.iter().all(|fill| *fill < 60.0), "{light:?} {dark:?}");
    assert_ne!(light_png, dark_png);
    // What is too wide would have been seen.
    browser.run(
        "const wide = document.body.appendChild(document.createElement('p'));
         wide.textContent = 'wide';
         wide.style.width = '500px';",
    );
    assert_eq!(browser.run("return document.documentElement.scrollWidth"), 500);
}

#[test]
fn a_button_drains_after_a_yes_and_takes_it_back() {
    let receiver = Receiver::with_header(say_who);
    let balancer = preface(&config(&receiver, free_port(), ""));
    let browser = open(&balancer);
    let address = receiver.address;
    let row = format!("tr[data-address='{address}']");
    let admin = || balancer.upstream("ingress", address)["admin"].clone();

    browser.wait_for(&row, "its button", |text| text.contains("Drain"));
    browser.click(&format!("{row} [data-order=drain]"));
    let question = browser.text("dialog[open]");
    assert!(question.contains(&format!("Drain {address}?")), "{question}");
    assert!(question.contains("the last healthy and enabled upstream of this pool"), "{question}");
    browser.click("dialog [value=no]");
    assert_eq!(admin(), "enabled");

    browser.click(&format!("{row} [data-order=drain]"));
    browser.click("dialog .sure");
    browser.wait_for(&row, "draining, by whom", |text| text.contains("draining") && text.contains("by admin api"));
    assert_eq!(admin(), "draining");
    browser.click(&format!("{row} [data-order=enable]"));
    browser.click("dialog .sure");
    browser.wait_for(&row, "enabled", |text| text.contains("enabled") && !text.contains("draining"));
    assert_eq!(admin(), "enabled");
    assert_eq!(browser.console(), Vec::<String>::new());
}

#[test]
fn asks_for_the_token_where_one_is_needed() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("token");
    std::fs::write(&file, "s3cret\n").expect("it is written");
    let receiver = Receiver::with_header(say_who);
    let token = format!("[admin]\ntoken_file = {file:?}\n");
    let balancer = preface(&config(&receiver, free_port(), &token));
    let browser = open(&balancer);
    let address = receiver.address;
    let row = format!("tr[data-address='{address}']");
    browser.wait_for(&row, "its button", |text| text.contains("Disable"));
    browser.click(&format!("{row} [data-order=disable]"));
    browser.click("dialog .sure");
    browser.wait_for("dialog[open]", "the question", |text| text.contains("wants the token"));
    browser.type_into("dialog input", "wrong");
    browser.click("dialog .sure");
    browser.wait_for("dialog[open]", "the answer", |text| text.contains("that is not the token"));
    assert_eq!(balancer.upstream("ingress", address)["admin"], "enabled");
    browser.type_into("dialog input", "s3cret\u{e007}");
    browser.wait_for(&row, "disabled", |text| text.contains("disabled"));
    assert_eq!(balancer.upstream("ingress", address)["admin"], "disabled");
}

#[test]
fn pause_keeps_the_page_as_it_is_and_an_end_of_the_process_is_said() {
    let receiver = Receiver::with_header(say_who);
    let mut balancer = preface(&config(&receiver, free_port(), ""));
    let browser = open(&balancer);
    browser.click("#pause");
    browser.wait_for("#live", "paused", |text| text.starts_with("paused at "));
    let before = browser.text("#listeners");
    exchange(&balancer, "web");
    let counted = || balancer.status()["listeners"]["web"]["accepted"] == 1;
    eventually("the connection is counted", || counted().then_some(()));
    let events = || browser.run("return Number(document.documentElement.dataset.events)").as_u64();
    let seen = events();
    eventually("the page has heard of it", || (events() >= seen.map(|seen| seen + 2)).then_some(()));
    assert_eq!(browser.text("#listeners"), before);
    browser.click("#pause");
    browser.wait_for("#listeners", "the connection", |text| text.contains("v2 1"));
    balancer.signal(rustix::process::Signal::TERM);
    assert!(balancer.wait_exit().success());
    browser.wait_for("#live", "the silence", |text| text.starts_with("no answer for "));
}

#[test]
fn a_row_opens_with_every_figure_of_its_times() {
    let receiver = Receiver::with_header(say_who);
    let balancer = preface(&config(&receiver, free_port(), ""));
    exchange(&balancer, "web");
    let browser = open(&balancer);
    let row = format!("tr[data-address='{}']", receiver.address);
    browser.wait_for(&row, "its times", |text| text.contains("all times"));
    browser.click(&format!("{row} .row-button"));
    let lines = |text: &str| -> Vec<Vec<String>> {
        let cells = |line: &str| line.split('\t').map(|cell| cell.trim().to_owned()).collect();
        text.lines().filter(|line| line.contains(" ms\t")).map(cells).collect()
    };
    let opened = format!("{row} + tr .times");
    let text = browser.wait_for(&opened, "both periods", |text| lines(text).len() == 6);
    let shown = lines(&text);
    let kinds: Vec<(&str, &str)> = shown.iter().map(|line| (line[0].as_str(), line[1].as_str())).collect();
    let due = ["connect", "first byte", "connection"].map(|kind| [(kind, "last minute"), (kind, "since the start")]);
    assert_eq!(kinds, due.concat());
    // p50, p90, p99, p99.9, max, and how many.
    assert!(shown.iter().all(|line| line.len() == 8 && line[2..7].iter().all(|cell| cell.ends_with(" ms"))), "{text}");
    assert!(shown.iter().all(|line| line[7] == "1"), "{text}");
    // It follows what happens, and so does the pool's.
    exchange(&balancer, "web");
    browser.wait_for(&opened, "the second connection", |text| lines(text).iter().all(|line| line[7] == "2"));
    let pool = format!("#pools .card:has({row})");
    browser.click(&format!("{pool} > .head .row-button"));
    browser.wait_for(&format!("{pool} > div > .times"), "the pool's", |text| lines(text).len() == 6);
    browser.click(&format!("{row} .row-button"));
    eventually("the row is closed", || {
        let count = browser.run("return document.querySelectorAll('#pools td .times').length");
        (count == 0).then_some(())
    });
    assert_eq!(browser.console(), Vec::<String>::new());
}
