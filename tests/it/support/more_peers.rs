//! More real receivers, for what they make of headers: Apache, Varnish, Postfix, Dovecot, MariaDB, Python, nginx with TLS.

use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use super::ports::free_port;
use super::{Process, eventually, program, template};

/// A running receiver.
pub struct Peer {
    _process: Process,
    _directory: TempDir,
    /// A port that takes headers.
    pub headers: u16,
    /// A port that takes none.
    pub plain: u16,
    /// Postfix's postscreen, which takes headers; of the others the same as `headers`.
    pub third: u16,
}

/// A directory that a program's own user may enter, and the ports.
struct Place {
    directory: TempDir,
    headers: u16,
    plain: u16,
    third: u16,
}

impl Place {
    fn new() -> Place {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(directory.path(), open).expect("the directory is ours");
        Place { directory, headers: free_port(), plain: free_port(), third: free_port() }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Writes a template of `tests/peers` into the directory.
    #[track_caller]
    fn write(&self, from: &str, to: &str, user: &str) {
        let (dir, user) = (self.path().display().to_string(), if is_root() { user } else { "" });
        let ports = [self.headers, self.plain, self.third].map(|port| port.to_string());
        let [headers, plain, third] = &ports;
        let values =
            [("dir", dir.as_str()), ("user", user), ("headers", headers), ("plain", plain), ("postscreen", third)];
        std::fs::write(self.path().join(to), template(from, &values)).expect("the configuration is written");
    }

    /// Starts it, and waits until its ports take connections.
    #[track_caller]
    fn start(self, command: &mut Command, ports: &[u16]) -> Peer {
        let mut process = Process::start(command);
        for port in ports {
            eventually("the receiver listens", || {
                assert!(process.is_running(), "the receiver ended at its start");
                TcpStream::connect((Ipv4Addr::LOCALHOST, *port)).ok()
            });
        }
        let Place { directory, headers, plain, third } = self;
        Peer { _process: process, _directory: directory, headers, plain, third }
    }
}

/// Mail servers change their user, and so must be started by root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// mod_remoteip's `RemoteIPProxyProtocol On`, and a virtual host without it.
#[track_caller]
pub fn apache() -> Peer {
    let place = Place::new();
    place.write("apache.conf", "apache.conf", "User www-data\nGroup www-data");
    let file = place.path().join("apache.conf");
    let ports = [place.headers, place.plain];
    place.start(Command::new(program("apache2")).arg("-f").arg(file).arg("-DFOREGROUND"), &ports)
}

/// `-a :port,PROXY`, and one without.
#[track_caller]
pub fn varnish() -> Peer {
    let place = Place::new();
    place.write("varnish.vcl", "varnish.vcl", "");
    let mut command = Command::new(program("varnishd"));
    command.args(["-F", "-j", "none", "-T", "none", "-s", "malloc,8m", "-n"]).arg(place.path().join("work"));
    command.arg("-f").arg(place.path().join("varnish.vcl"));
    command.args(["-a", &format!("127.0.0.1:{},PROXY", place.headers), "-a", &format!("127.0.0.1:{}", place.plain)]);
    let ports = [place.headers, place.plain];
    place.start(&mut command, &ports)
}

/// smtpd and postscreen with `..._upstream_proxy_protocol=haproxy`, and smtpd without.
#[track_caller]
pub fn postfix() -> Peer {
    let place = Place::new();
    place.write("postfix-main.cf", "main.cf", "");
    place.write("postfix-master.cf", "master.cf", "");
    let queues = ["public", "private", "active", "incoming", "maildrop", "defer", "deferred", "bounce"];
    let mut own = vec![place.path().join("data")];
    own.extend(queues.map(|queue| place.path().join("queue").join(queue)));
    for directory in &own {
        std::fs::create_dir_all(directory).expect("a directory of Postfix");
    }
    std::fs::create_dir(place.path().join("queue/pid")).expect("a directory of Postfix");
    let (status, output) = Process::run(Command::new("chown").arg("postfix").args(&own));
    assert!(status.success(), "{output}");
    let ports = [place.headers, place.plain, place.third];
    let mut command = Command::new(program("/usr/lib/postfix/sbin/master"));
    let directory = place.path().to_owned();
    place.start(command.arg("-c").arg(directory).arg("-d"), &ports)
}

/// IMAP with `haproxy = yes`, and without.
#[track_caller]
pub fn dovecot() -> Peer {
    let place = Place::new();
    place.write("dovecot.conf", "dovecot.conf", "");
    let file = place.path().join("dovecot.conf");
    let ports = [place.headers, place.plain];
    place.start(Command::new(program("dovecot")).arg("-F").arg("-c").arg(file), &ports)
}

/// MariaDB without tables; `headers` is its only port.
#[track_caller]
pub fn mariadb(networks: Option<&str>) -> Peer {
    let place = Place::new();
    let data = place.path().join("data");
    std::fs::create_dir(&data).expect("a directory of MariaDB");
    let mut command = Command::new(program("mariadbd"));
    command.arg("--no-defaults").arg(format!("--datadir={}", data.display()));
    command.arg(format!("--socket={}", place.path().join("socket").display()));
    command.arg(format!("--pid-file={}", place.path().join("pid").display()));
    command.args(["--bind-address=127.0.0.1", "--skip-networking=0", "--skip-grant-tables", "--innodb=OFF"]);
    command.args(["--default-storage-engine=Aria", "--lc-messages-dir=/usr/share/mysql"]);
    command.arg(format!("--port={}", place.headers));
    command.args(networks.map(|networks| format!("--proxy-protocol-networks={networks}")));
    if is_root() {
        command.arg("--user=root");
    }
    let ports = [place.headers];
    place.start(&mut command, &ports)
}

/// `python3 -m http.server`, which knows no header.
#[track_caller]
pub fn python() -> Peer {
    let place = Place::new();
    let port = place.plain.to_string();
    let mut command = Command::new(program("/usr/bin/python3"));
    command.args(["-m", "http.server", "--bind", "127.0.0.1", "--directory"]).arg(place.path()).arg(port);
    let ports = [place.plain];
    place.start(&mut command, &ports)
}

/// TLS behind a header, and TLS at once.
#[track_caller]
pub fn nginx_tls() -> Peer {
    let place = Place::new();
    place.write("nginx-tls.conf", "nginx.conf", "user root;");
    let mut command = Command::new(program("nginx"));
    command.arg("-p").arg(place.path()).arg("-c").arg(place.path().join("nginx.conf"));
    command.arg("-e").arg(place.path().join("error.log"));
    let ports = [place.headers, place.plain];
    place.start(&mut command, &ports)
}

/// The same by HAProxy, which has a certificate and shows it.
#[track_caller]
pub fn haproxy_tls() -> Peer {
    let place = Place::new();
    place.write("haproxy-tls.cfg", "haproxy.cfg", "");
    let mut certificate = Command::new(program("openssl"));
    certificate.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]);
    certificate.args(["-subj", "/CN=test", "-keyout", "server.pem", "-out", "certificate.pem"]);
    let (status, output) = Process::run(certificate.current_dir(place.path()));
    assert!(status.success(), "{output}");
    let read = |file: &str| std::fs::read(place.path().join(file)).expect("openssl has written it");
    let both = [read("server.pem"), read("certificate.pem")].concat();
    std::fs::write(place.path().join("server.pem"), both).expect("the certificate is written");
    let file = place.path().join("haproxy.cfg");
    let ports = [place.headers, place.plain];
    place.start(Command::new(program("haproxy")).arg("-db").arg("-f").arg(file), &ports)
}
