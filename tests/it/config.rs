//! The configuration as an operator meets it: what is said about broken files, and that the shipped ones hold what they
//! promise.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use preface::cli;
use preface::config::hints::Surroundings;
use preface::config::keys::{Default, FILE, Kind, Table};
use preface::config::{self, AdminBind, Bind, CheckCommand, CheckHeader, Config, HeaderFormat, Parsed, Probe, Style};

/// Files under `tests/broken`; each has a reviewed snapshot of what `check` says.
const BROKEN_FILES: usize = 46;

fn files(directory: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).expect("the repository has it");
    let paths = entries.map(|entry| entry.expect("readable").path());
    let mut files: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|end| end == "toml")).collect();
    files.sort();
    files
}

fn parsed(text: &str) -> Parsed {
    config::parse("test.toml", text).unwrap_or_else(|errors| panic!("{errors}"))
}

fn refused(text: &str) -> String {
    config::parse("test.toml", text).map(|_| ()).expect_err("it is broken").to_string()
}

fn load(name: &str) -> Config {
    let path = format!("config/{name}.toml");
    let parsed = config::load(Path::new(&path), &Surroundings::default()).unwrap_or_else(|error| panic!("{error}"));
    assert!(parsed.warnings.is_empty(), "{path}: {}", parsed.warnings);
    parsed.config
}

#[test]
fn says_what_is_wrong_with_each_broken_file() {
    let files = files("tests/broken");
    assert_eq!(files.len(), BROKEN_FILES, "a file was added or lost");
    for file in &files {
        let outcome = cli::check::check(file, Style::Plain);
        assert!(!outcome.is_ok, "{} is not broken", file.display());
        let text = format!("{}\n\n{}", outcome.reports.join("\n\n"), outcome.summary);
        insta::with_settings!({
            snapshot_path => "../broken",
            prepend_module_to_snapshot => false,
            omit_expression => true,
        }, {
            insta::assert_snapshot!(file.file_stem().expect("it has a name").to_string_lossy().as_ref(), text);
        });
    }
}

#[test]
fn each_snapshot_belongs_to_a_broken_file() {
    let stems = |end: &str| -> BTreeSet<String> {
        let entries = fs::read_dir("tests/broken").expect("it is there").map(|entry| entry.expect("readable").path());
        let own = entries.filter(|path| path.extension().is_some_and(|is| is == end));
        own.map(|path| path.file_stem().expect("it has a name").to_string_lossy().into_owned()).collect()
    };
    assert_eq!(stems("toml"), stems("snap"));
}

#[test]
fn a_missing_file_and_a_directory_are_said_with_what_to_do_next() {
    let said = |path: &str| {
        config::load(Path::new(path), &Surroundings::default()).map(|_| ()).expect_err("nothing to load").to_string()
    };
    insta::assert_snapshot!(said("tests/broken/there-is-no-such-file.toml"), @"tests/broken/there-is-no-such-file.toml: no such file; is its path right? `preface demo` needs no file");
    insta::assert_snapshot!(said("tests"), @"tests: is a directory; name the file in it");
}

#[test]
fn warnings_do_not_stop_a_file() {
    let text = r#"
[listeners.web]
bind = ["[::]:80", "10.0.0.1:80", "127.0.0.1:0"]
pool = "web"
deny = ["10.0.0.5/8", "10.0.0.0/8"]

[listeners.loop]
bind = ":8080"
pool = "loop"

[listeners.big]
bind = ":81"
pool = "big"
tlvs = { custom = [{ type = 0xE4, text = "TEXT" }] }

[pools.web]
proxy_protocol = "v2"
upstreams = [{ address = "10.0.0.30:80", weight = 0 }]

[pools.web.health_check]
port = 8080
proxy_protocol = "same"
timeout = "10s"

[pools.loop]
upstreams = ["127.0.0.1:8080", "[::1]"]
health_check = { proxy_command = "proxy" }

[pools.big]
proxy_protocol = "v2"
upstreams = ["10.0.0.30:80"]
health_check = { proxy_protocol = "off" }

[pools.unused]
upstreams = ["10.0.0.30:80"]

[pools.datagrams]
upstreams = ["10.0.0.30:53"]
health_check = { protocol = "udp", expect = "PONG" }
"#
    .replace("TEXT", &"x".repeat(1_025));
    insta::assert_snapshot!("warnings", parsed(&text).warnings.to_string());
}

#[test]
fn what_is_for_the_other_protocol_is_said() {
    let said = |protocol: &str, listener: &str, pool: &str| {
        let text = format!(
            "[listeners.a]\nbind = \":53\"\nprotocol = {protocol}\npool = \"p\"\n{listener}\n\
             [pools.p]\nupstreams = [\"10.0.0.1:53\"]\n{pool}\n"
        );
        parsed(&text).warnings.to_string()
    };
    for (protocol, listener, pool, warning) in [
        ("\"udp\"", "keepalive = \"30s\"", "", "\"keepalive\" is for TCP and has no effect: listener \"a\" serves UDP"),
        ("\"udp\"", "", "fast_open = true", "\"fast_open\" is for TCP and has no effect"),
        ("\"tcp\"", "", "udp_header = \"first_alone\"", "\"udp_header\" is for UDP and has no effect"),
    ] {
        assert!(said(protocol, listener, pool).contains(warning), "{}", said(protocol, listener, pool));
        assert_eq!(said("[\"tcp\", \"udp\"]", listener, pool), "");
    }
    assert_eq!(said("\"udp\"", "keepalive = \"off\"", "fast_open = false"), "");
    assert_eq!(said("\"tcp\"", "", "udp_header = \"every_datagram\""), "");
}

#[test]
fn colours_are_for_terminals_alone() {
    let Err(errors) = config::parse("x.toml", "[listeners.web]\nbind = 80") else { panic!("it is broken") };
    assert!(errors.render(Style::Terminal).join("").contains('\u{1b}'));
    assert!(!errors.render(Style::Plain).join("").contains('\u{1b}'));
}

#[test]
fn ten_thousand_errors_are_counted_and_not_all_shown() {
    let keys: String = (0..10_000).map(|n| format!("key{n} = 1\n")).collect();
    let Err(errors) = config::parse("x.toml", &keys) else { panic!("it is broken") };
    let rendered = errors.render(Style::Plain);
    assert_eq!(rendered.len(), 101);
    assert_eq!(rendered[100], "... and 9901 more");
}

#[test]
fn the_reference_has_no_warnings_and_its_defaults_are_the_ones_applied() {
    let reference = load("preface");
    let bare = r#"
[listeners.web]
bind = ":80"
pool = "ingress"
[pools.ingress]
upstreams = ["10.0.0.30:80"]
[pools.ingress.health_check]
[listeners.api]
bind = ["192.0.2.1:8443", "[2001:db8::1]:8443"]
pool = "api"
[pools.api]
upstreams = ["10.0.0.40:8443", "10.0.0.41:8443"]
[pools.api.health_check]
protocol = "http"
"#;
    let mut bare = parsed(bare).config;
    // Written as off in the reference, and not written: both mean off.
    let mut ingress = (*bare.pools["ingress"]).clone();
    ingress.tlvs.crc32c = Some(false);
    ingress.tlvs.unique_id = Some(false);
    bare.pools.insert("ingress".to_owned(), ingress.into());
    assert_eq!(reference, bare);
}

#[test]
fn the_reference_shows_every_key_and_the_default_of_each() {
    let text = fs::read_to_string("config/preface.toml").expect("it is there");
    let shown: toml::Value = toml::from_str(&text).expect("it is TOML");
    let examples: toml::Value = toml::from_str(&uncommented(&text)).expect("its examples are TOML");
    let mut tables = BTreeMap::new();
    collect(&FILE, &[&shown], &[&examples], &mut tables);
    assert!(tables.len() >= 10, "{:?}", tables.keys());
    let missing: Vec<String> = tables.values().flat_map(missing).collect();
    assert!(missing.is_empty(), "config/preface.toml: {missing:#?}");
}

/// Every table of one kind in the reference: as it is, and with its examples in force.
struct Instances<'v> {
    table: &'static Table,
    shown: Vec<&'v toml::Value>,
    examples: Vec<&'v toml::Value>,
}

fn collect<'v>(
    table: &'static Table,
    shown: &[&'v toml::Value],
    examples: &[&'v toml::Value],
    found: &mut BTreeMap<&'static str, Instances<'v>>,
) {
    let (none_shown, no_examples) = (Vec::new(), Vec::new());
    let instances = found.entry(table.name).or_insert(Instances { table, shown: none_shown, examples: no_examples });
    instances.shown.extend(shown);
    instances.examples.extend(examples);
    for key in table.keys {
        let below = |of: &[&'v toml::Value]| -> Vec<&'v toml::Value> {
            let values = of.iter().filter_map(|table| table.get(key.name));
            let tables = values.flat_map(|value| -> Vec<&toml::Value> {
                match (&key.kind, value) {
                    (Kind::Named(_), toml::Value::Table(tables)) => tables.values().collect(),
                    (_, toml::Value::Array(array)) => array.iter().collect(),
                    (_, value) => vec![value],
                }
            });
            tables.collect()
        };
        if let Some(table) = key.kind.table() {
            collect(table, &below(shown), &below(examples), found);
        }
    }
}

/// Keys that the reference does not have, and defaults that it does not show.
fn missing(instances: &Instances<'_>) -> Vec<String> {
    let has = |of: &[&toml::Value], key: &str, value: Option<&toml::Value>| {
        of.iter().filter_map(|table| table.get(key)).any(|written| value.is_none_or(|value| value == written))
    };
    let missing = instances.table.keys.iter().filter_map(|key| {
        let name = format!("{}.{}", instances.table.name, key.name);
        let default = match key.default {
            Default::Boolean(value) => Some(toml::Value::from(value)),
            Default::Integer(value) => Some(toml::Value::from(i64::try_from(value).expect("small"))),
            Default::Text(value) => Some(toml::Value::from(value)),
            Default::Texts(values) => Some(toml::Value::from(values.to_vec())),
            Default::None | Default::Required => None,
        };
        match (&key.kind, default) {
            (Kind::Later, _) if has(&instances.examples, key.name, None) => {
                Some(format!("{name} is not supported yet"))
            }
            (Kind::Later, _) => None,
            _ if !has(&instances.examples, key.name, None) => Some(format!("{name} is not there")),
            (_, Some(value)) if !has(&instances.shown, key.name, Some(&value)) => {
                Some(format!("{name} does not show its default {value}"))
            }
            _ => None,
        }
    });
    missing.collect()
}

/// With every example in force.
fn uncommented(text: &str) -> String {
    let is_key = |line: &str| line.starts_with(|c: char| c.is_ascii_lowercase());
    let lines = text.lines().map(|line| line.strip_prefix('#').filter(|rest| is_key(rest)).unwrap_or(line));
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn the_examples_in_the_reference_are_valid() {
    let text = fs::read_to_string("config/preface.toml").expect("it is there");
    let text = uncommented(&text).replace("proxy_protocol = \"off\" ", "proxy_protocol = \"v2\" ");
    let config = parsed(&text).config;
    let web = &config.listeners["web"];
    assert_eq!(web.tlvs.vpce_id.as_deref(), Some("vpce-08d2bf15fac5001c9"));
    assert_eq!(config.pools["ingress"].upstreams[0].max_connections, 1_000);
    assert_eq!(config.pools["ingress"].health_check.as_ref().and_then(|check| check.port), Some(8_080));
}

#[test]
fn every_shipped_file_is_valid_and_loads_without_a_warning() {
    let files = files("config");
    assert!(files.len() >= 7, "{files:?}");
    for file in files {
        let outcome = cli::check::check(&file, Style::Plain);
        assert!(outcome.is_ok && outcome.reports.is_empty(), "{:#?}", outcome.reports);
        assert_eq!(outcome.summary, format!("{}: ok", file.display()));
    }
}

#[test]
fn the_shipped_files_hold_what_their_names_promise() {
    let ingress = load("ingress-nginx");
    assert!(ingress.listeners.values().all(|listener| listener.pool == "ingress"));
    let ports: Vec<u16> = ingress.listeners.values().map(|listener| listener.binds[0].port().unwrap()).collect();
    assert_eq!(ports, [80, 443]);
    let pool = &ingress.pools["ingress"];
    assert!(pool.upstreams.iter().all(|upstream| upstream.address.takes_port()));
    let check = pool.health_check.as_ref().expect("it is checked");
    assert_eq!((check.port, check.proxy_protocol), (Some(10_254), CheckHeader::Off));

    let nlb = load("aws-nlb");
    assert_eq!(nlb.listeners["web"].idle_timeout.as_secs(), 350);
    assert_eq!(nlb.pools["targets"].tlvs.crc32c, Some(true));

    let elb = load("aws-classic-elb");
    let mut ports: Vec<u16> = elb.listeners.values().flat_map(|l| &l.binds).filter_map(|b| b.port()).collect();
    ports.sort_unstable();
    assert_eq!(ports, [80, 81, 443]);
    assert!(
        elb.pools["instances"]
            .upstreams
            .iter()
            .all(|u| u.proxy_protocol == Some(HeaderFormat::V1) && u.address.takes_port())
    );

    let gcp = load("gcp-tcp-proxy");
    assert!(gcp.pools["backends"].upstreams.iter().all(|u| u.proxy_protocol == Some(HeaderFormat::V1)));
    let nginx = load("nginx");
    assert!(nginx.pools["nginx"].upstreams.iter().all(|u| u.proxy_protocol == Some(HeaderFormat::V2)));
    assert_eq!(load("minimal").pools["web"].health_check, None);
}

#[test]
fn a_receivers_lines_say_who_may_send_headers() {
    for (name, limit) in [
        ("nginx", "set_real_ip_from 10.0.0.5;"),
        ("ingress-nginx", "proxy-real-ip-cidr: \"10.0.0.5/32\""),
        ("aws-nlb", "expect-proxy layer4 if { src 10.0.0.5 }"),
        ("aws-classic-elb", "set_real_ip_from 10.0.0.5;"),
        ("gcp-tcp-proxy", "expect-proxy layer4 if { src 10.0.0.5 }"),
    ] {
        let text = fs::read_to_string(format!("config/{name}.toml")).expect("it is there");
        assert!(text.contains(limit) && text.contains("forge"), "{name} does not say whom to trust, and why");
    }
}

#[test]
fn the_committed_schema_is_the_generated_one() {
    let committed = fs::read_to_string("config/preface.schema.json").unwrap_or_default();
    assert!(committed == cli::schema::text(), "another one: cargo run -- schema > config/preface.schema.json");
}

#[test]
fn where_the_admin_api_is_can_be_read_from_a_broken_file() {
    let tcp = |text: &str| Some(AdminBind::Tcp(text.parse().expect("an address")));
    let bind = config::lenient_admin_bind;
    assert_eq!(bind("[admin]\nbind = \"127.0.0.1:1234\"\n[listeners.web\nbind = \":80"), tcp("127.0.0.1:1234"));
    assert_eq!(bind("[runtime]\nx = \n[admin]\nbind = \"unix:/run/a\""), Some(AdminBind::Unix("/run/a".into())));
    assert_eq!(bind("[admin]\nbind = \"nonsense\""), None);
    assert_eq!(bind("[admin]\nbind = 80"), None);
    assert_eq!(bind("admin = 3"), None);
    assert_eq!(bind(""), None);
    assert_eq!(bind("[listeners.web]\nbind = \":80\""), None);
}

#[test]
fn a_bind_address_is_for_ipv6_alone_only_where_ipv4_is_bound_too() {
    let flags = |binds: &str| -> Vec<(bool, bool)> {
        let text = format!("[listeners.a]\nbind = {binds}\npool = \"p\"\n[pools.p]\nupstreams = [\"10.0.0.1:1\"]");
        parsed(&text).config.listeners["a"]
            .binds
            .iter()
            .filter_map(Bind::ip)
            .map(|bind| (bind.any, bind.v6only))
            .collect()
    };
    assert_eq!(flags(r#"":80""#), [(true, false)]);
    assert_eq!(flags(r#""[::]:80""#), [(false, false)]);
    assert_eq!(flags(r#"["[::]:80", "0.0.0.0:80"]"#), [(false, true), (false, false)]);
    assert_eq!(flags(r#"["[::]:80", "0.0.0.0:81"]"#), [(false, false), (false, false)]);
    assert_eq!(flags(r#"["[::]:80", "10.0.0.1:80"]"#), [(false, true), (false, false)]);
    assert_eq!(flags(r#"[":80", "10.0.0.1:80"]"#), [(true, false), (false, false)]);
    assert_eq!(flags(r#"["[2001:db8::1]:80", "[::]:80"]"#), [(false, false), (false, false)]);
}

#[test]
fn upstreams_take_what_they_do_not_say_from_their_pool() {
    let config = parsed(
        r#"
[listeners.a]
bind = ":80"
pool = "p"
[pools.p]
proxy_protocol = "v2"
max_connections = 5
upstreams = [
    "10.0.0.1",
    { address = "[2001:db8::1]", proxy_protocol = "v1" },
    { address = "[2001:db8::1]:443", proxy_protocol = "off", max_connections = 0, weight = 256, backup = true },
]
"#,
    )
    .config;
    let upstreams = &config.pools["p"].upstreams;
    let of = |at: usize| (upstreams[at].to_string(), upstreams[at].proxy_protocol, upstreams[at].max_connections);
    assert_eq!(of(0), ("10.0.0.1".to_owned(), Some(HeaderFormat::V2), 5));
    assert_eq!(of(1), ("2001:db8::1".to_owned(), Some(HeaderFormat::V1), 5));
    assert_eq!(of(2), ("[2001:db8::1]:443".to_owned(), None, 0));
    assert_eq!((upstreams[2].weight, upstreams[2].backup), (256, true));
}

#[test]
fn source_networks_are_sorted_by_the_longest_prefix() {
    let tlvs =
        r#"[{ from = "10.0.0.0/8", id = "a" }, { from = "10.1.2.3", id = "b" }, { from = "10.1.0.0/16", id = "c" }]"#;
    let text = format!(
        "[listeners.a]\nbind = \":80\"\npool = \"p\"\ntlvs.vpce_id_by_source = {tlvs}\n\
         [pools.p]\nproxy_protocol = \"v2\"\nupstreams = [\"10.0.0.1:1\"]\ntlvs.gcp_psc_id = 18446744073709551615"
    );
    let config = parsed(&text).config;
    let ids = config.listeners["a"].tlvs.vpce_id_by_source.as_ref().expect("it is set");
    assert_eq!(ids.iter().map(|(_, id)| id.as_str()).collect::<String>(), "bca");
    assert_eq!(config.pools["p"].tlvs.gcp_psc_id, Some(u64::MAX));
}

#[test]
fn a_check_sends_the_traffics_header_on_the_traffics_port_alone() {
    let header = |upstream: &str, check: &str| {
        let text = format!(
            "[listeners.a]\nbind = \":80\"\npool = \"p\"\n\
             [pools.p]\nproxy_protocol = \"v2\"\nupstreams = [\"{upstream}\"]\nhealth_check = {{ {check} }}"
        );
        parsed(&text).config.pools["p"].health_check.clone().expect("it is checked").proxy_protocol
    };
    assert_eq!(header("10.0.0.1:80", ""), CheckHeader::Same);
    assert_eq!(header("10.0.0.1:80", "port = 80"), CheckHeader::Same);
    assert_eq!(header("10.0.0.1:80", "port = 8080"), CheckHeader::Off);
    assert_eq!(header("10.0.0.1", "port = 80"), CheckHeader::Off);
    assert_eq!(header("10.0.0.1:80", "port = 8080, proxy_protocol = \"same\""), CheckHeader::Same);
    assert_eq!(header("10.0.0.1:80", "proxy_protocol = \"v1\""), CheckHeader::Format(HeaderFormat::V1));
}

#[test]
fn a_udp_check_names_its_own_addresses_unless_it_is_told_otherwise() {
    let check = |check: &str| {
        let text = format!(
            "[listeners.a]\nbind = \":53\"\npool = \"p\"\n\
             [pools.p]\nproxy_protocol = \"v2\"\nupstreams = [\"10.0.0.1:53\"]\nhealth_check = {{ {check} }}"
        );
        let parsed = parsed(&text);
        assert!(parsed.warnings.is_empty(), "{}", parsed.warnings);
        parsed.config.pools["p"].health_check.clone().expect("it is checked")
    };
    assert_eq!(check("protocol = \"udp\"").probe, Probe::Udp { send: vec![], expect: vec![] });
    assert_eq!(check("protocol = \"udp\"").proxy_protocol, CheckHeader::Same);
    assert_eq!(check("protocol = \"udp\"").proxy_command, CheckCommand::Proxy);
    assert_eq!(check("protocol = \"udp\", proxy_command = \"local\"").proxy_command, CheckCommand::Local);
    for other in ["", "protocol = \"tcp\"", "protocol = \"http\""] {
        assert_eq!(check(other).proxy_command, CheckCommand::Local, "{other}");
    }
    let question = check(r#"protocol = "udp", send = "\u0000\u0001", expect = "PONG", port = 5353"#);
    assert_eq!(question.probe, Probe::Udp { send: vec![0, 1], expect: b"PONG".to_vec() });
    assert_eq!((question.port, question.proxy_protocol), (Some(5_353), CheckHeader::Off));
}

const BEFORE: &str = r#"
[listeners.gone]
bind = ":81"
pool = "web"
[listeners.same]
bind = ":82"
pool = "same"
[listeners.web]
bind = ":80"
pool = "web"
[pools.same]
upstreams = ["10.0.0.9:80"]
[pools.web]
proxy_protocol = "v2"
upstreams = ["10.0.0.30:80", "10.0.0.31:80"]
[pools.web.health_check]
"#;

const AFTER: &str = r#"
[runtime]
workers = 4
[log]
level = "debug"
[admin]
bind = "unix:/run/preface/admin.sock"
[listeners.new]
bind = ["127.0.0.1:83", "[::1]:83"]
pool = "api"
[listeners.same]
bind = ":82"
pool = "same"
[listeners.web]
bind = [":80", "[2001:db8::1]:443"]
pool = "web"
idle_timeout = "350s"
keepalive = "off"
deny = ["10.9.0.0/16"]
tlvs = { vpce_id = "vpce-1", vpce_id_by_source = [{ from = "10.1.0.0/16", id = "vpce-2" }] }
[pools.api]
upstreams = ["10.0.0.40"]
[pools.same]
upstreams = ["10.0.0.9:80"]
[pools.web]
proxy_protocol = "v2"
balance = "least_connections"
upstreams = [{ address = "10.0.0.31:80", weight = 5, proxy_protocol = "v1", backup = true }, "10.0.0.32:80"]
tlvs = { custom = [{ type = 0xE4, text = "edge-1" }] }
[pools.web.health_check]
protocol = "http"
port = 8080
interval = "10s"
"#;

#[test]
fn changes_are_told_in_one_line_each() {
    let (before, after) = (parsed(BEFORE).config, parsed(AFTER).config);
    insta::assert_snapshot!("diff", config::diff(&before, &after).join("\n"));
    assert_eq!(config::diff(&before, &parsed(BEFORE).config), [""; 0]);
}

#[test]
fn no_change_goes_untold() {
    // Whatever differs makes at least one line: else a reload would say that nothing changed.
    let before = parsed(BEFORE).config;
    let reordered = BEFORE.replace(r#"["10.0.0.30:80", "10.0.0.31:80"]"#, r#"["10.0.0.31:80", "10.0.0.30:80"]"#);
    assert_eq!(config::diff(&before, &parsed(&reordered).config), ["pool \"web\": upstreams are in another order"]);
    let six = |extra: &str| {
        let binds = format!(
            "[listeners.a]\nbind = [\"[::]:80\"]\npool = \"web\"\n[listeners.b]\nbind = \"{extra}\"\npool = \"web\"\n"
        );
        parsed(&format!("{binds}[pools.web]\nupstreams = [\"10.0.0.1:1\"]")).config
    };
    let lines = config::diff(&six("0.0.0.0:80"), &six("0.0.0.0:81"));
    assert_eq!(lines.len(), 2, "{lines:?}");
}

#[test]
fn what_did_not_change_keeps_its_arc() {
    let before = parsed(BEFORE).config;
    let after = config::reuse(&before, parsed(AFTER).config);
    assert!(std::sync::Arc::ptr_eq(&before.listeners["same"], &after.listeners["same"]));
    assert!(std::sync::Arc::ptr_eq(&before.pools["same"], &after.pools["same"]));
    assert!(!std::sync::Arc::ptr_eq(&before.pools["web"], &after.pools["web"]));
    assert_eq!(after, parsed(AFTER).config);
}

#[test]
fn one_mistake_is_one_error() {
    let error = |text: &str| {
        let said = refused(text);
        assert_eq!(said.matches("error: ").count(), 1, "{said}");
    };
    let base = "[listeners.a]\nbind = \":80\"\npool = \"p\"\n[pools.p]\n";
    // A version that cannot be read says nothing about whether TLVs have a place.
    error(&format!("{base}proxy_protocol = \"v3\"\nupstreams = [\"10.0.0.1:1\"]\ntlvs.crc32c = true"));
    error(&format!("{base}proxy_protocol = \"v2\"\nupstreams = [\"10.0.0.256:1\"]\ntlvs.crc32c = true"));
    error(&format!("{base}upstreams = [{{ address = \"10.0.0.1:1\", proxy_protocol = \"x\", tlvs.crc32c = true }}]"));
    // Nor does a broken header mean that keys, listeners or pools are missing.
    error("[listeners.a\nbind = \":80\"\npool = \"p\"\n[pools.p]\nupstreams = [\"10.0.0.1:1\"]");
    error("[listeners.a]\nbind = \":80\"\npool = \"p\"\n[pools.p\nupstreams = [\"10.0.0.1:1\"]");
}

#[test]
fn no_damage_to_a_file_makes_the_parser_or_its_reports_panic() {
    let text = fs::read_to_string("config/preface.toml").expect("it is there");
    let text = text.replace("# required.", "# ü\t\u{1f980}\r\n#");
    let check = |text: &str| {
        if let Err(errors) = config::parse("x.toml", text) {
            assert!(
                errors.render(Style::Plain).iter().all(|report| report.contains("error: ") || report.contains("more"))
            );
        }
        config::lenient_admin_bind(text);
    };
    let boundaries: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
    let junk = ["", "[", "]]", "\"", "'''", "=", "\n", "{", "\0", "9e9", "\\u", ",", "[[a.b]]\n", "é"];
    let mut random = fastrand::Rng::with_seed(1);
    for _ in 0..300 {
        let at = random.usize(..boundaries.len());
        let to = boundaries.get(at + random.usize(..20)).copied().unwrap_or(text.len());
        let from = boundaries[at];
        check(&text[..from]);
        check(&format!("{}{}{}", &text[..from], junk[random.usize(..junk.len())], &text[to..]));
    }
    check(&"[".repeat(100_000));
    check(&format!("a = {}", "[".repeat(100_000)));
    check(&format!("{} = 1\n", ["a"; 10_000].join(".")));
}
