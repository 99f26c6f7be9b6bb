//! The control thread: it starts everything, is the one writer of the snapshot, and ends everything.

pub mod watch;
mod admin_side;
mod exposition;
mod history;
mod local_resources;
mod look;
mod names;
mod notify;
mod problems;
mod reload;
mod slowness;
mod sockets;
pub mod speed;
mod state;
mod status;
mod suspicion;
pub mod upgrade;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, anyhow};
use arc_swap::ArcSwap;
use tokio::runtime::LocalOptions;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval, sleep_until};

use crate::admin::{self, announce};
use crate::config::error::Style;
use crate::config::load;
use crate::config::{Config, Protocol};
use crate::control::probes::Probes;
use crate::control::{self, Command, ReloadTrigger};
use crate::discovery::Discovery;
use crate::drain::OpenConnections;
use crate::log;
use crate::net;
use crate::net::inherited::{self, Inherited};
use crate::net::limits;
use crate::snapshot::{Inputs, Snapshot};
use crate::termination::Termination;
use crate::worker::{Message, Place, Worker};
use admin_side::AdminSide;
use history::History;
use names::Names;
use notify::Notifier;
use slowness::SlowUpstreams;
use state::{LogLevel, State};
use upgrade::{Predecessor, Program, Taken};
use watch::{Asked, Change, ContentHash, Reply, Watch};

/// Connections that are reset at the end have this long to be counted and logged.
const LAST_RESETS: Duration = Duration::from_secs(1);

/// Serves the configuration in `path` until told to stop. Errors are for a person: what, where, what to do.
/// `program`: what an upgrade starts in this process's place; without one there is no upgrade.
///
/// Called while the process has one thread: it takes the variables that tell of inherited sockets.
pub fn run(path: PathBuf, program: Option<Program>) -> anyhow::Result<()> {
    let mut inherited = inherited::take();
    let mut predecessor = Predecessor::of_this_process()?;
    if let Some(predecessor) = &mut predecessor {
        inherited = predecessor.take_inherited();
    }
    let content = watch::read(&path).map_err(|error| load::unreadable(&path, &error))?;
    let (parsed, text) = reload::parse(&path, &content).map_err(|errors| anyhow!("{}", errors.join("\n\n")))?;
    let log = log::init(parsed.config.log.format, &parsed.config.log.level)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
    let warnings = parsed.warnings.render(Style::Plain);
    let file = LoadedFile { path, text, warnings, hash: ContentHash::of(&content) };
    let outcome = runtime.block_on(serve(file, parsed.config, log.clone(), inherited, program, predecessor));
    log.flush(Duration::from_secs(1));
    // A look at the file that hangs (NFS, a flood of file events) must not hold up the end of the process.
    runtime.shutdown_background();
    outcome
}

/// The configuration file as it was read at the start.
struct LoadedFile {
    path: PathBuf,
    text: String,
    warnings: Vec<String>,
    hash: ContentHash,
}

async fn serve(
    file: LoadedFile,
    config: Config,
    log: log::Log,
    inherited: Inherited,
    program: Option<Program>,
    mut predecessor: Option<Predecessor>,
) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    let (handle, mut commands) = control::channel();
    let admin = AdminSide::bind(&config.admin, predecessor.as_mut())?;
    let admin_bind = admin.address()?;
    let mut state = start_state(&file.path, &config, log, handle, inherited, admin)?;
    (state.text, state.warnings) = (file.text, file.warnings);
    (state.program, state.predecessor) = (program, predecessor);
    let mut config = config;
    tokio::select! {
        () = state.wait_for_first_answers(&config, &mut commands) => {}
        name = stop_signal(&mut signals.terminate, &mut signals.interrupt) => {
            tracing::info!(event = "stop", signal = name, "stopped before anything was served");
            return Ok(());
        }
    }
    state.resolve(&mut config);
    let bound = state.bind(&config).map_err(|errors| anyhow!("{}", errors.join("\n")))?;
    let taken = state.take_over(&config)?;
    state.put_in_force(config, bound).await;
    state.probes.set_configured();
    state.probes.set_listening();
    state.start_admin();
    if let Some(taken) = &taken {
        taken.serving()?;
    }
    state.own_socket_files();
    state.admin.announce(&admin_bind, taken.as_ref().and_then(|taken| taken.admin.as_ref()));
    state.warnings.extend(state.limit_warnings(&state.config));
    let (watch, mut watch_warnings) = Watch::start(&state.path, file.hash);
    watch_warnings.extend(token_warning(&state.config));
    for warning in state.warnings.iter().chain(&watch_warnings) {
        tracing::warn!(event = "config", warning);
    }
    state.tell_of_unused_sockets();
    for (slot, listener) in &state.snapshot.load().slots {
        tracing::debug!(event = "listen", listener = &*listener.life.name, slot);
    }
    tracing::info!(
        event = "start", version = env!("CARGO_PKG_VERSION"), config = %state.path.display(), admin = %announce::address_text(&admin_bind),
        workers = state.workers.len(), listeners = state.config.listeners.len(), pools = state.config.pools.len(),
        max_connections = state.inputs.connections_max, in_place_of = taken.as_ref().map(|taken| taken.from), "serving"
    );
    match taken {
        Some(taken) => {
            state.notifier.be_silent();
            state.speaks_after = Some(tokio::task::spawn_blocking(|| taken.wait_for_predecessor()));
        }
        None => state.notify_ready(),
    }
    run_until_stopped(&mut state, commands, watch, &mut signals).await;
    state.admin.end(LAST_RESETS).await;
    state.workers.drain(..).for_each(Worker::join);
    tracing::info!(event = "stop", "stopped");
    Ok(())
}

/// Every call that needs the token is refused while its file cannot be used; better to know it before.
fn token_warning(config: &Config) -> Option<String> {
    let path = config.admin.token_file.as_deref()?;
    let error = admin::read_token(path).err()?;
    Some(format!(
        "admin.token_file {} cannot be used: {error}; until it can, calls that need it are refused",
        path.display()
    ))
}

fn start_state(
    path: &Path,
    config: &Config,
    log: log::Log,
    handle: control::Handle,
    inherited: Inherited,
    admin: AdminSide,
) -> anyhow::Result<State> {
    let descriptors = limits::raise_descriptor_limit();
    let snapshot = Arc::new(ArcSwap::from_pointee(Snapshot::default()));
    let open = Arc::new(OpenConnections::default());
    let count = Some(config.runtime.workers).filter(|count| *count > 0).unwrap_or_else(limits::default_workers);
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
        pending: Vec::new(),
        warnings: Vec::new(),
        inputs,
        snapshot,
        workers,
        checkers: BTreeMap::new(),
        deadlines: Vec::new(),
        reports: VecDeque::new(),
        reloads: [0; 3],
        refused_since: None,
        touched: HashSet::new(),
        joined: HashSet::new(),
        closing: Vec::new(),
        socket_files: HashMap::new(),
        next_slot: 0,
        suspicions: BTreeMap::new(),
        slow: SlowUpstreams::new(Instant::now()),
        shortages: BTreeMap::new(),
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
        admin,
        program: None,
        upgrade: None,
        predecessor: None,
        speaks_after: None,
        notifier: Notifier::from_environment(),
    })
}

impl State {
    /// Says to the process whose place is taken that this one could serve, and waits until it has let go.
    fn take_over(&mut self, config: &Config) -> anyhow::Result<Option<Taken>> {
        let Some(predecessor) = self.predecessor.take() else { return Ok(None) };
        let (taken, takeover) = predecessor.take_over()?;
        takeover.apply(config, &mut self.inputs);
        Ok(Some(taken))
    }

    /// The admin API, and the probes where they have an address of their own.
    fn start_admin(&mut self) {
        let (control, probes, access) = (self.handle.clone(), Arc::clone(&self.probes), Arc::clone(&self.access));
        self.admin.start(|scope| admin::State {
            control: control.clone(),
            probes: Arc::clone(&probes),
            access: Arc::clone(&access),
            scope,
        });
    }
}

/// The signals that are listened to.
struct Signals {
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
    upgrade: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Signals> {
        Ok(Signals {
            hangup: signal(SignalKind::hangup())?,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            upgrade: signal(SignalKind::user_defined2())?,
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
    /// The same, since another process serves. The first signal to stop finds it stopping.
    HandedOver(Instant),
}

impl Stopping {
    /// When the next thing happens by itself.
    fn at(&self) -> Option<Instant> {
        match self {
            Stopping::No => None,
            Stopping::Delay(at) | Stopping::Draining(at) | Stopping::HandedOver(at) => Some(*at),
        }
    }
}

async fn run_until_stopped(
    state: &mut State,
    mut commands: mpsc::Receiver<Command>,
    mut watch: Watch,
    signals: &mut Signals,
) {
    let Signals { hangup, terminate, interrupt, upgrade } = signals;
    let mut tick = interval(history::INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut stopping = Stopping::No;
    let mut watchdog = notify::watchdog();
    let open = Arc::clone(&state.open);
    loop {
        state.probes.control_turned(Instant::now());
        if state.stopping {
            refuse_asked(state, &mut watch).await;
        }
        let (stop_at, deadline) = (stopping.at(), state.next_deadline());
        tokio::select! {
            command = commands.recv() => {
                let Some(command) = command else { return };
                carry_out(state, command, &mut watch).await;
                while let Ok(command) = commands.try_recv() {
                    carry_out(state, command, &mut watch).await;
                }
                state.publish();
            }
            // While a new process starts, which reads the file itself, nothing may change of what it was offered.
            change = watch.changed(), if !state.stopping && state.upgrade.is_none() => {
                file_changed(state, change, &mut watch).await;
            }
            _ = hangup.recv(), if state.upgrade.is_none() => {
                reload_from_file(state, ReloadTrigger::Signal, &mut watch, None).await;
            }
            _ = upgrade.recv() => state.begin_upgrade(None).await,
            ready = upgrade::ready(&mut state.upgrade) => {
                if state.finish_upgrade(ready).await {
                    close_listeners(state).await;
                    stopping = Stopping::HandedOver(Instant::now() + state.config.runtime.stop_timeout);
                }
            }
            name = stop_signal(terminate, interrupt) => match stop_ordered(state, name, &stopping) {
                Some(next) => stopping = next,
                None => return reset_the_rest(state).await,
            },
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
            () = open.empty(), if matches!(stopping, Stopping::Draining(_) | Stopping::HandedOver(_)) => return,
            () = at(deadline) => state.fire(Instant::now()).await,
            // Also the signs of life of the workers.
            _ = tick.tick() => {
                state.sample().await;
                state.notify_status();
            }
            () = notify::tick(&mut watchdog) => state.notify_alive(),
            () = upgrade::released(&mut state.speaks_after) => {
                state.speaks_after = None;
                state.notify_main_process();
            }
        }
    }
}

/// A signal to stop came: what comes next; `None`: the end, at once.
fn stop_ordered(state: &mut State, signal: &str, stopping: &Stopping) -> Option<Stopping> {
    let open = state.open.count();
    match stopping {
        Stopping::No => {
            // A new process that is only just starting ends with this.
            drop(state.upgrade.take());
            state.stopping = true;
            state.probes.set_stopping();
            state.notify_stopping();
            let delay = state.config.runtime.stop_delay;
            tracing::info!(event = "stop", signal, open, stop_delay = %humantime::format_duration(delay), "stopping");
            Some(Stopping::Delay(Instant::now() + delay))
        }
        Stopping::HandedOver(until) => {
            tracing::info!(event = "stop", signal, open, "stopping since the upgrade");
            Some(Stopping::Draining(*until))
        }
        Stopping::Delay(_) | Stopping::Draining(_) => {
            tracing::warn!(event = "stop", signal, open, "second signal: stopping at once");
            None
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
        Command::Upgrade(reply) => state.begin_upgrade(Some(reply)).await,
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
        Command::Knows(names, reply) => drop(reply.send(state.knows(names))),
        Command::Follow(filter, sender) => state.follow(filter, sender).await,
        Command::EndConnection(id, by, reply) => drop(reply.send(state.end_connection(&id, &by).await)),
        Command::SetLogLevel(level, by, reply) => drop(reply.send(state.set_log_level(&level, &by))),
        Command::History(reply) => {
            let has_udp = |name: &str| state.config.listeners.get(name).is_some_and(|one| one.serves(Protocol::Udp));
            let _ = reply.send(state.history.value(has_udp));
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

/// Has the file read, on a thread of its own: a network file system may hang, and everything else goes on.
async fn reload_from_file(state: &mut State, trigger: ReloadTrigger, watch: &mut Watch, reply: Option<Reply>) {
    match state.refuses_reloads() {
        Some(refused) => state.reload_when_resolved(trigger, Err(refused.to_owned()), reply).await,
        None => watch.ask(Asked { trigger, reply }),
    }
}

/// Answers those whose file is still being read when nothing is reloaded any more.
async fn refuse_asked(state: &mut State, watch: &mut Watch) {
    let Some(refused) = state.refuses_reloads() else { return };
    for Asked { trigger, reply } in watch.take_asked() {
        state.reload_when_resolved(trigger, Err(refused.to_owned()), reply).await;
    }
}

async fn file_changed(state: &mut State, change: Change, watch: &mut Watch) {
    let Change { content, last_try, asked } = change;
    let is_asked = !asked.is_empty();
    let content = match content {
        // Half a save, perhaps: it comes once more.
        Ok(content) if !is_asked && reload::parse(&state.path, &content).is_err() && watch.retry() => return,
        Ok(content) => Ok(content),
        Err(_) if !last_try && watch.retry() => return,
        Err(error) => Err(format!("error: {}", load::unreadable(&state.path, &error))),
    };
    for Asked { trigger, reply } in asked {
        state.reload_when_resolved(trigger, content.clone(), reply).await;
    }
    if !is_asked {
        state.reload_when_resolved(ReloadTrigger::File, content, None).await;
    }
}
