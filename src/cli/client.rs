//! Speaks to the running process: finds its admin address, and calls it over TCP or a UNIX socket.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Method, Request, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use toml::de::DeTable;

use crate::admin::{self, announce};
use crate::config::{self, AdminBind};

/// Where `[admin] bind` is when nothing says otherwise.
const DEFAULT_ADDRESS: &str = "127.0.0.1:9900";

/// A process on this machine accepts within this long, or is not well.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Of an answer; the status of thousands of upstreams is a few MiB.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Arguments of every command that asks the running process.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Finding the running process")]
pub struct Options {
    /// Its admin address: 127.0.0.1:9900 or unix:/path. Otherwise $PREFACE_ADMIN, the file preface.admin in
    /// $RUNTIME_DIRECTORY or /run/preface, [admin] bind of the configuration file, 127.0.0.1:9900
    #[arg(long, value_name = "ADDR")]
    pub admin: Option<String>,
    /// File with the admin token. Otherwise $PREFACE_TOKEN_FILE, [admin] token_file of the configuration file
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Configuration file to look into; errors in it don't matter here
    #[arg(long, value_name = "FILE", env = "PREFACE_CONFIG", hide_env_values = true, default_value = super::CONFIG_FILE)]
    pub config: PathBuf,
}

/// What of the environment counts.
#[derive(Clone, Debug, Default)]
struct Environment {
    /// `$PREFACE_ADMIN`
    admin: Option<String>,
    /// `$PREFACE_TOKEN_FILE`
    token_file: Option<PathBuf>,
    /// Where `preface.admin` may be, in this order.
    runtime_directories: Vec<PathBuf>,
}

/// A found process.
#[derive(Debug)]
pub struct Client {
    bind: AdminBind,
    origin: Origin,
    token: Token,
}

/// Where an address came from.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Origin {
    Flag,
    Variable,
    Announced(PathBuf),
    Configuration(PathBuf),
    /// And why not from the configuration.
    Default(String),
}

/// The token, or why there is none. Reading the probes needs none, so a problem counts only when one is asked for.
#[derive(Debug)]
enum Token {
    Known { file: PathBuf, token: String },
    Unreadable { file: PathBuf, error: String },
    NotSet,
}

/// What the process answered.
#[derive(Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// The body as text.
    pub text: String,
}

impl Options {
    /// Find the process. A broken configuration file is no error.
    pub fn client(&self) -> anyhow::Result<Client> {
        let first = announce::runtime_directory(std::env::var("RUNTIME_DIRECTORY").ok().as_deref());
        let mut runtime_directories = vec![first, announce::DIRECTORY.into()];
        runtime_directories.dedup();
        let not_empty = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        self.client_in(Environment {
            admin: not_empty("PREFACE_ADMIN").map(|value| value.to_string_lossy().into_owned()),
            token_file: not_empty("PREFACE_TOKEN_FILE").map(PathBuf::from),
            runtime_directories,
        })
    }

    fn client_in(&self, environment: Environment) -> anyhow::Result<Client> {
        let configuration = read_lossy(&self.config);
        let (bind, origin) = self.find(&environment, &configuration)?;
        let configured = || configuration.as_ref().ok().and_then(|text| lenient_token_file(text));
        let token = match self.token_file.clone().or(environment.token_file).or_else(configured) {
            None => Token::NotSet,
            Some(file) => match admin::read_token(&file) {
                Ok(token) => Token::Known { file, token },
                Err(error) => Token::Unreadable { file, error: error.to_string() },
            },
        };
        Ok(Client { bind: reachable(bind), origin, token })
    }

    fn find(
        &self,
        environment: &Environment,
        configuration: &Result<String, String>,
    ) -> anyhow::Result<(AdminBind, Origin)> {
        let parse = |text: &str, what: &str| {
            let bind = announce::parse(text);
            bind.ok_or_else(|| anyhow!("{what} {text:?} is not an address; write 127.0.0.1:9900 or unix:/path"))
        };
        if let Some(text) = &self.admin {
            return Ok((parse(text, "--admin")?, Origin::Flag));
        }
        if let Some(text) = &environment.admin {
            return Ok((parse(text, "$PREFACE_ADMIN")?, Origin::Variable));
        }
        for directory in &environment.runtime_directories {
            // A directory that this user may not read is as good as none.
            if let Ok(Some(bind)) = announce::announced(directory) {
                return Ok((bind, Origin::Announced(directory.join(announce::FILE_NAME))));
            }
        }
        let file = self.config.display();
        let why = match configuration {
            Ok(text) => match config::lenient_admin_bind(text) {
                Some(bind) => return Ok((bind, Origin::Configuration(self.config.clone()))),
                None => format!("{file} has no usable [admin] bind"),
            },
            Err(error) => format!("{file} cannot be read: {error}"),
        };
        Ok((parse(DEFAULT_ADDRESS, "the default")?, Origin::Default(why)))
    }
}

fn read_lossy(path: &Path) -> Result<String, String> {
    let bytes = fs::read(path).map_err(|error| error.to_string())?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// `[admin] token_file` of a file that may be broken in every other respect.
fn lenient_token_file(text: &str) -> Option<PathBuf> {
    let (document, _) = DeTable::parse_recoverable(text);
    let file = document.get_ref().get("admin")?.get_ref().get("token_file")?.get_ref().as_str()?.to_owned();
    Some(PathBuf::from(file))
}

/// What is bound to every address is called at the loopback one.
fn reachable(bind: AdminBind) -> AdminBind {
    match bind {
        AdminBind::Tcp(mut address) if address.ip().is_unspecified() => {
            address.set_ip(if address.is_ipv4() {
                [127, 0, 0, 1].into()
            } else {
                std::net::Ipv6Addr::LOCALHOST.into()
            });
            AdminBind::Tcp(address)
        }
        other => other,
    }
}

impl Client {
    /// As in `[admin] bind`.
    pub fn address(&self) -> String {
        announce::address_text(&self.bind)
    }

    /// Ask and wait this long for the answer.
    pub fn get(&self, path: &str, within: Duration) -> anyhow::Result<Answer> {
        self.call(Method::GET, path, within)
    }

    /// Order and wait this long for the outcome.
    pub fn post(&self, path: &str, within: Duration) -> anyhow::Result<Answer> {
        self.call(Method::POST, path, within)
    }

    fn call(&self, method: Method, path: &str, within: Duration) -> anyhow::Result<Answer> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.context("cannot start the runtime")?.block_on(async {
            match &self.bind {
                AdminBind::Tcp(address) => {
                    let stream = self.connected(TcpStream::connect(address)).await?;
                    self.exchange(stream, address.to_string(), method, path, within).await
                }
                AdminBind::Unix(file) => {
                    let stream = self.connected(UnixStream::connect(file)).await?;
                    self.exchange(stream, "localhost".to_owned(), method, path, within).await
                }
            }
        })
    }

    async fn connected<S>(&self, connecting: impl Future<Output = std::io::Result<S>>) -> anyhow::Result<S> {
        let error = match timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} s", CONNECT_TIMEOUT.as_secs()),
        };
        let next = match &self.bind {
            AdminBind::Unix(_) if error.contains("Permission denied") => {
                "run this as root or in the group of that socket"
            }
            _ => "is preface running? name its address with --admin ADDR or $PREFACE_ADMIN",
        };
        bail!("no preface answers on {self}: {error}; {next}")
    }

    async fn exchange<S>(
        &self,
        stream: S,
        host: String,
        method: Method,
        path: &str,
        within: Duration,
    ) -> anyhow::Result<Answer>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, host)
            .header(header::USER_AGENT, admin::COMMAND_LINE_AGENT)
            .header("x-preface", "1");
        if let Token::Known { token, .. } = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let request = request.body(Empty::<Bytes>::new()).context("this cannot be said in a request")?;
        let exchange = async {
            let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
            // Errors of the connection come out of the request as well.
            tokio::spawn(connection);
            let (head, body) = sender.send_request(request).await?.into_parts();
            let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await.map_err(|error| anyhow!(error))?;
            let text = String::from_utf8_lossy(&body.to_bytes()).into_owned();
            anyhow::Ok(Answer { status: head.status.as_u16(), text })
        };
        let answer = timeout(within, exchange).await;
        let answer = answer.map_err(|_| anyhow!("{self} has not answered for {} s; see its log", within.as_secs()))?;
        let answer = answer.with_context(|| format!("{self} does not answer like preface"))?;
        if answer.status == 401 { Err(self.refused_token(&answer)) } else { Ok(answer) }
    }

    fn refused_token(&self, answer: &Answer) -> anyhow::Error {
        match &self.token {
            Token::Known { file, .. } => {
                anyhow!("{self} refused the token of {}: {}", file.display(), answer.error())
            }
            Token::Unreadable { file, error } => {
                anyhow!("{self} wants a token, and {} cannot be used: {error}", file.display())
            }
            Token::NotSet => {
                anyhow!("{self} wants a token: name its file with --token-file FILE or $PREFACE_TOKEN_FILE")
            }
        }
    }
}

/// The address and where it came from.
impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (", announce::address_text(&self.bind))?;
        match &self.origin {
            Origin::Flag => f.write_str("from --admin)"),
            Origin::Variable => f.write_str("from $PREFACE_ADMIN)"),
            Origin::Announced(file) => write!(f, "from {})", file.display()),
            Origin::Configuration(file) => write!(f, "from [admin] bind in {})", file.display()),
            Origin::Default(why) => write!(f, "the default: {why})"),
        }
    }
}

impl Answer {
    /// The body as JSON; an error for every other status than 200.
    pub fn json(&self) -> anyhow::Result<Value> {
        if self.status != 200 {
            bail!("{}", self.error());
        }
        serde_json::from_str(&self.text).context("the answer is not JSON: another program, or another version?")
    }

    /// What went wrong, in the words of the process.
    pub fn error(&self) -> String {
        let said = serde_json::from_str::<Value>(&self.text).ok();
        match said.as_ref().and_then(|said| said["error"].as_str()) {
            Some(error) => error.to_owned(),
            None => format!("the answer is {} {}", self.status, self.text.lines().next().unwrap_or_default()),
        }
    }
}

/// One segment of a path.
pub fn encoded(segment: &str) -> String {
    let mut text = String::with_capacity(segment.len());
    for byte in segment.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b':' => text.push(byte.into()),
            _ => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
