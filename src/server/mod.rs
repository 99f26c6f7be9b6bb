//! The control thread: it starts everything, is the one writer of the snapshot, and ends everything.

pub mod watch;
mod exposition;
mod history;
mod look;
mod names;
mod reload;
mod sockets;
mod state;
mod status;
mod suspicion;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, anyhow};
use arc_swap::ArcSwap;
use tokio::runtime::LocalOptions;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, sleep_until};

use crate::admin::{self, Listener, announce};
use crate::config::error::Style;
use crate::config::{AdminBind, Config};
use crate::control::probes::Probes;
use crate::control::{self, Command, ReloadTrigger};
use crate::discovery::Discovery;
use crate::drain::{OpenConnections, Stop, StopSource};
use crate::log;
use crate::net;
use crate::net::inherited::{self, Inherited};
use crate::net::limits;
use crate::snapshot::{Inputs, Snapshot};
use crate::termination::Termination;
use crate::worker::{Message, Place, Worker};
use history::History;
use names::Names;
use state::{LogLevel, State};
use watch::{ContentHash, Watch};

/// Connections that are reset at the end have this long to be counted and logged.
const LAST_RESETS: Duration = Duration::from_secs(1);

/// Serves the configuration in `path` until told to stop. Errors are for a person: what, where, what to do.
///
/// Called while the process has one thread: it takes the variables that tell of inherited sockets.
pub fn run(path: PathBuf) -> anyhow::Result<()> {
    let inherited = inherited::take();
    let content = watch::read(&path).with_context(|| {
        format!("cannot read {}; name the file with --config, or see `preface demo`", path.display())
    })?;
    let (parsed, text) = reload::parse(&path, &content).map_err(|errors| anyhow!("{}", errors.join("\n\n")))?;
    let log = log::init(parsed.config.log.format, &parsed.config.log.level)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
    let warnings = parsed.warnings.render(Style::Plain);
    let outcome =
        runtime.block_on(serve(path, parsed.config, text, warnings, ContentHash::of(&content), log.clone(), inherited));
    log.flush(Duration::from_secs(1));
    // A look at the file that hangs (NFS, a flood of file events) must not hold up the end of the process.
    runtime.shutdown_background();
    outcome
}

async fn serve(
    path: PathBuf,
    config: Config,
    text: String,
    warnings: Vec<String>,
    hash: ContentHash,
    log: log::Log,
    inherited: Inherited,
) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    let (handle, mut commands) = control::channel();
    let listener = admin::bind(&config.admin.bind)?;
    let probe_bind = config.admin.probe_bind.map(AdminBind::Tcp);
    let probe_listener = probe_bind.as_ref().map(admin::bind).transpose()?;
    let mut state = start_state(&path, &config, log, handle, inherited)?;
    (state.text, state.warnings) = (text, warnings);
    let admin_bind = listener.address()?;
    let mut config = config;
    tokio::select! {
        () = state.wait_for_first_answers(&config, &mut commands) => {}
        name = stop_signal(&mut signals.terminate, &mut signals.interrupt) => {
            tracing::info!(event = "stop", signal = name, "stopped before anything was served");
            return Ok(());
        }
    }
    state.resolve(&mut config);
    state.apply(config).await.map_err(|errors| anyhow!("{}", errors.join("\n")))?;
    state.probes.set_configured();
    state.probes.set_listening();
    let (stop_source, stop) = StopSource::new();
    let admin_task = start_admin(&state, listener, probe_listener, &stop);
    let directory = announce::runtime_directory(std::env::var("RUNTIME_DIRECTORY").ok().as_deref());
    let announcement = announce::announce(&directory, &admin_bind);
    let (watch, watch_warnings) = Watch::start(&path, hash);
    for warning in state.warnings.iter().chain(&watch_warnings) {
        tracing::warn!(event = "config", warning);
    }
    state.tell_of_unused_sockets();
    for (slot, listener) in &state.snapshot.load().slots {
        tracing::debug!(event = "listen", listener = &*listener.life.name, slot);
    }
    tracing::info!(
        event = "start", version = env!("CARGO_PKG_VERSION"), config = %path.display(), admin = %announce::address_text(&admin_bind),
        workers = state.workers.len(), listeners = state.config.listeners.len(), pools = state.config.pools.len(),
        max_connections = state.inputs.connections_max, "serving"
    );
    run_until_stopped(&mut state, commands, watch, &mut signals).await;
    stop_source.stop();
    let _ = tokio::time::timeout(LAST_RESETS, admin_task).await;
    drop(announcement);
    state.workers.drain(..).for_each(Worker::join);
    tracing::info!(event = "stop", "stopped");
    Ok(())
}

fn start_state(
    path: &Path,
    config: &Config,
    log: log::Log,
    handle: control::Handle,
    inherited: Inherited,
) -> anyhow::Result<State> {
    let descriptors = limits::raise_descriptor_limit();
    let snapshot = Arc::new(ArcSwap::from_pointee(Snapshot::default()));
    let open = Arc::new(OpenConnections::default());
    let count = match config.runtime.workers {
        0 => limits::default_workers(),
        count => count,
    };
    let probes = Arc::new(Probes::new(count, Instant::now()));
    let processors = if config.runtime.pin_workers { limits::processors() } else { Vec::new() };
    let mut workers = Vec::with_capacity(count);
    for number in 0..count {
        let (snapshot, open) = (Arc::clone(&snapshot), Arc::clone(&open));
        let processor = processors.get(number % processors.len().max(1)).copied();
        let place = Place { number, processor, pipes_max: limits::pipes_max(descriptors, count) };
        let worker = Worker::start(place, snapshot, open, handle.clone(), log.sender(), Arc::clone(&probes));
        workers.push(worker.context("cannot start a worker thread; see ulimit -u and the cgroup's pids.max")?);
    }
    let (has_ipv6, ports) = (net::has_ipv6(), limits::local_ports());
    let inputs = Inputs { inherited: Arc::new(inherited), has_ipv6, ports, ..Inputs::default() };
    let nothing = Config { listeners: BTreeMap::new(), pools: BTreeMap::new(), ..config.clone() };
    Ok(State {
        path: path.to_owned(),
        config: nothing,
        text: String::new(),
        warnings: Vec::new(),
        inputs,
        snapshot,
        workers,
        checkers: BTreeMap::new(),
        deadlines: Vec::new(),
        reports: VecDeque::new(),
        reloads: [0; 3],
        touched: HashSet::new(),
        joined: HashSet::new(),
        closing: Vec::new(),
        socket_files: HashMap::new(),
        next_slot: 0,
        suspicions: BTreeMap::new(),
        log_level: LogLevel::configured(&config.log.level),
        history: History::new(count, Instant::now()),
        names: Names::new(Discovery::new(handle.clone())),
        spare: Vec::new(),
        unresponsive: 0,
        access: Arc::default(),
        probes,
        log,
        handle,
        open,
        descriptors,
        started: SystemTime::now(),
        stopping: false,
    })
}

/// The admin API, and the probes where they have an address of their own; both until the stop.
fn start_admin(state: &State, listener: Listener, probe_listener: Option<Listener>, stop: &Stop) -> JoinHandle<()> {
    let all = admin::State {
        control: state.handle.clone(),
        probes: Arc::clone(&state.probes),
        access: Arc::clone(&state.access),
        scope: admin::Scope::All,
    };
    if let Some(probe_listener) = probe_listener {
        let probes = admin::State { scope: admin::Scope::Probes, ..all.clone() };
        let mut stop = stop.clone();
        tokio::spawn(admin::serve(probe_listener, probes, async move { stop.stopped().await }));
    }
    let mut stop = stop.clone();
    tokio::spawn(admin::serve(listener, all, async move { stop.stopped().await }))
}

/// The signals that are listened to.
struct Signals {
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Signals> {
        Ok(Signals {
            hangup: signal(SignalKind::hangup())?,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }
}

async fn stop_signal(terminate: &mut Signal, interrupt: &mut Signal) -> &'static str {
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}

/// How far a stop has come.
enum Stopping {
    /// Not ordered.
    No,
    /// Still accepting, until then.
    Delay(Instant),
    /// Listeners are closed; open connections have until then.
    Draining(Instant),
}

async fn run_until_stopped(
    state: &mut State,
    mut commands: mpsc::Receiver<Command>,
    mut watch: Watch,
    signals: &mut Signals,
) {
    let Signals { hangup, terminate, interrupt } = signals;
    let mut tick = interval(history::INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut stopping = Stopping::No;
    let open = Arc::clone(&state.open);
    loop {
        state.probes.control_turned(Instant::now());
        let stop_at = match stopping {
            Stopping::No => None,
            Stopping::Delay(at) | Stopping::Draining(at) => Some(at),
        };
        tokio::select! {
            command = commands.recv() => {
                let Some(command) = command else { return };
                carry_out(state, command, &mut watch).await;
                while let Ok(command) = commands.try_recv() {
                    carry_out(state, command, &mut watch).await;
                }
                state.publish();
            }
            change = watch.changed(), if !state.stopping => file_changed(state, change, &mut watch).await,
            _ = hangup.recv() => {
                reload_from_file(state, ReloadTrigger::Signal, &mut watch, None).await;
            }
            name = stop_signal(terminate, interrupt) => {
                if state.stopping {
                    tracing::warn!(event = "stop", signal = name, open = open.count(), "second signal: stopping at once");
                    return reset_the_rest(state).await;
                }
                state.stopping = true;
                state.probes.set_stopping();
                let delay = state.config.runtime.stop_delay;
                tracing::info!(event = "stop", signal = name, open = open.count(), stop_delay = %humantime::format_duration(delay), "stopping");
                stopping = Stopping::Delay(Instant::now() + delay);
            }
            () = at(stop_at) => match stopping {
                Stopping::Delay(_) => {
                    close_listeners(state).await;
                    stopping = Stopping::Draining(Instant::now() + state.config.runtime.stop_timeout);
                }
                _ => {
                    tracing::warn!(event = "stop", open = open.count(), "stop_timeout is over: the rest is reset");
                    return reset_the_rest(state).await;
                }
            },
            () = open.empty(), if matches!(stopping, Stopping::Draining(_)) => return,
            () = at(state.next_deadline()) => state.fire(Instant::now()).await,
            // Also the signs of life of the workers.
            _ = tick.tick() => state.sample().await,
        }
    }
}

/// Ends what is still open, and sees it counted and logged.
async fn reset_the_rest(state: &mut State) {
    state.end(None, Termination::StopTimeout).await;
    let _ = tokio::time::timeout(LAST_RESETS, state.open.empty()).await;
}

/// Completes then; never without a time.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}

async fn close_listeners(state: &mut State) {
    // Nobody new finds UNIX sockets from here on; what is queued is still served.
    state.socket_files.clear();
    let mut closed = Vec::new();
    for worker in &state.workers {
        let (sender, receiver) = oneshot::channel();
        worker.send(Message::Stop(sender)).await;
        closed.push(receiver);
    }
    for receiver in closed {
        let _ = receiver.await;
    }
}

async fn carry_out(state: &mut State, command: Command, watch: &mut Watch) {
    // A reply that nobody waits for any more is no error.
    match command {
        Command::Reload(trigger, reply) => reload_from_file(state, trigger, watch, Some(reply)).await,
        Command::LookedUp(lookup) => state.looked_up(lookup).await,
        Command::SetAdmin(order, reply) => {
            let result = state.set_admin(order).await;
            let _ = reply.send(result);
        }
        Command::Observed(observations) => {
            for observation in observations {
                state.observed(observation).await;
            }
        }
        Command::ConnectsFailed(life) => state.connects_failed(&life).await,
        Command::Status(reply) => {
            state.collect().await;
            let _ = reply.send(state.status());
        }
        Command::Connections(filter, reply) => drop(reply.send(state.connections(filter).await)),
        Command::Tap(filter, reply) => drop(reply.send(state.tapped(filter).await)),
        Command::Follow(filter, sender) => state.follow(filter, sender).await,
        Command::EndConnection(id, by, reply) => drop(reply.send(state.end_connection(&id, &by).await)),
        Command::SetLogLevel(level, by, reply) => drop(reply.send(state.set_log_level(&level, &by))),
        Command::History(reply) => {
            let _ = reply.send(state.history.value());
        }
        Command::Config(reply) => {
            let _ = reply.send(state.config_in_force());
        }
        Command::Metrics(reply) => {
            state.collect().await;
            let _ = reply.send(state.exposition());
        }
    }
}

async fn reload_from_file(state: &mut State, trigger: ReloadTrigger, watch: &mut Watch, reply: Option<Reply>) {
    if state.stopping {
        let error = "error: the process is stopping: nothing is reloaded any more".to_owned();
        return state.reload_when_resolved(trigger, Err(error), reply).await;
    }
    let content = watch::read(&state.path);
    if let Ok(content) = &content {
        watch.delivered(ContentHash::of(content));
    }
    let content = content.map_err(|error| format!("error: {}: {error}", state.path.display()));
    state.reload_when_resolved(trigger, content, reply).await;
}

/// Whoever waits for the report of a reload.
type Reply = oneshot::Sender<Arc<control::ReloadReport>>;

async fn file_changed(state: &mut State, change: watch::Change, watch: &mut Watch) {
    let content = match change.content {
        // Half a save, perhaps: it comes once more.
        Ok(content) if reload::parse(&state.path, &content).is_err() && watch.retry() => return,
        Ok(content) => Ok(content),
        Err(_) if !change.last_try && watch.retry() => return,
        Err(error) => Err(format!("error: {}: {error}", state.path.display())),
    };
    state.reload_when_resolved(ReloadTrigger::File, content, None).await;
}
