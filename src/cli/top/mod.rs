//! `preface top`: the status in a terminal, every second, and orders by a key. What is shown is decided in `view` and
//! `draw`; here are the terminal, the clock and the calls.

mod draw;
mod model;
mod view;
mod words;

#[cfg(test)]
mod tests;

use std::io::{self, IsTerminal};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use ratatui::DefaultTerminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{self, Event, KeyEventKind};
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};

use super::client::{self, Client};
use super::order;
use draw::Scene;
use model::Model;
use view::{Action, Order, Target, View};

/// Between two questions.
const PERIOD: Duration = Duration::from_secs(1);
/// For an answer; then the screen says so, and it is asked again.
const TIMEOUT: Duration = Duration::from_secs(5);
/// The screen looks for keys and news at least this often.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// The width of a frame for scripts.
const ONCE_WIDTH: u16 = 140;

/// Watch pools and upstreams in the terminal; drain and enable by a key
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Every second: state, open connections, rates, percentiles of the last minute, and what is wrong.
Keys: arrows choose, d drain, x disable, e enable (each asks first), l all times of the chosen row,
s sort, / filter, ? help, q quit.

Examples:
  preface top
  preface top --admin 127.0.0.1:9900
  preface top --once | grep unhealthy")]
pub struct Args {
    /// Print one frame as text and end; the default where standard output is no terminal
    #[arg(long)]
    once: bool,
    #[command(flatten)]
    client: client::Options,
}

/// What the screen waits for, apart from keys.
enum News {
    /// An answer to `GET /status`, or why there is none.
    Status(Result<Value, String>),
    /// What became of an order.
    Ordered(Result<String, String>),
    /// A signal asks for the end, or nobody asks the process any more.
    End,
}

/// From a signal to the end, at most.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Tells the screen that its thread has come to an end, also by a panic.
struct Ending(Sender<News>);

impl Drop for Ending {
    fn drop(&mut self) {
        let _ = self.0.send(News::End);
    }
}

/// Shows until `q`.
pub fn run(args: Args) -> anyhow::Result<()> {
    let client = args.client.client()?;
    if args.once || !io::stdout().is_terminal() {
        return once(&client);
    }
    let address = client.address();
    let (news, inbox) = mpsc::channel();
    let (orders, given) = mpsc::channel();
    watch_signals(news.clone())?;
    spawn("status", move || ask_for_ever(&client, &news, &given))?;
    // From here on a panic gives the terminal back before it speaks.
    let mut terminal = ratatui::try_init().context("cannot use the terminal; `preface top --once` needs none")?;
    let outcome = Screen::new(address).run(&mut terminal, &inbox, &orders);
    ratatui::restore();
    outcome
}

fn once(client: &Client) -> anyhow::Result<()> {
    let model = Model::of_status(&client.get("/status", TIMEOUT)?.json()?);
    super::print(&frame(&model, &client.address()))
}

/// The screen as text, without what only keys are for.
fn frame(model: &Model, address: &str) -> String {
    let view = View::default();
    let scene = Scene { model: Some(model), address, silence: None, view: &view };
    let height = draw::height(&scene, ONCE_WIDTH);
    let backend = TestBackend::new(ONCE_WIDTH, height);
    let mut terminal = ratatui::Terminal::new(backend).expect("a terminal in memory has no errors");
    terminal
        .draw(|frame| draw::draw(&scene, frame.area(), frame.buffer_mut()))
        .expect("a terminal in memory has no errors");
    let buffer = terminal.backend().buffer();
    let lines = (0..height).map(|y| (0..ONCE_WIDTH).map(|x| buffer[(x, y)].symbol()).collect::<String>());
    let mut lines: Vec<String> = lines.map(|line| line.trim_end().replacen("> ", "  ", 1)).collect();
    lines.truncate(lines.len() - draw::foot_height(&scene, ONCE_WIDTH));
    while lines.last().is_some_and(|line| line.is_empty()) {
        lines.pop();
    }
    lines.join("\n") + "\n"
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    thread::Builder::new().name(name.to_owned()).spawn(work).context("cannot start a thread")?;
    Ok(())
}

fn watch_signals(news: Sender<News>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start")?;
    let entered = runtime.enter();
    let signals = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(signal);
    let [Ok(mut terminate), Ok(mut interrupt), Ok(mut hangup)] = signals else {
        anyhow::bail!("cannot watch for signals");
    };
    drop(entered);
    spawn("signals", move || {
        let ending = Ending(news);
        runtime.block_on(async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                _ = hangup.recv() => {}
            }
            drop(ending);
            // Who reads keys from a terminal that is gone never comes back from it.
            tokio::time::sleep(LAST_WORDS).await;
        });
        ratatui::restore();
        std::process::exit(1);
    })
}

/// Asks once a second, and gives orders as they come, until the screen is gone.
fn ask_for_ever(client: &Client, news: &Sender<News>, orders: &Receiver<(Order, Target)>) {
    let _ending = Ending(news.clone());
    loop {
        let asked = Instant::now();
        let status = client.get("/status", TIMEOUT).and_then(|answer| answer.json());
        if news.send(News::Status(status.map_err(|error| format!("{error:#}")))).is_err() {
            return;
        }
        match orders.recv_timeout(PERIOD.saturating_sub(asked.elapsed())) {
            Ok((order, target)) => {
                let path = order::path(&target.pool, target.address.as_deref(), order.as_str());
                let outcome = client.post(&path, TIMEOUT).and_then(|answer| answer.json());
                let said = outcome.map(|_| format!("done: {}", draw::title(order, &target)));
                if news.send(News::Ordered(said.map_err(|error| format!("not done: {error:#}")))).is_err() {
                    return;
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// What is on the screen, and since when.
struct Screen {
    address: String,
    view: View,
    model: Option<Model>,
    silence: Option<String>,
    heard: Instant,
}

impl Screen {
    fn new(address: String) -> Screen {
        Screen { address, view: View::default(), model: None, silence: None, heard: Instant::now() }
    }

    fn run(
        &mut self,
        terminal: &mut DefaultTerminal,
        inbox: &Receiver<News>,
        orders: &Sender<(Order, Target)>,
    ) -> anyhow::Result<()> {
        let mut is_old = true;
        loop {
            while let Ok(news) = inbox.try_recv() {
                is_old = true;
                match news {
                    News::Status(status) => self.take(status),
                    News::Ordered(said) => self.view.said = Some(said),
                    News::End => return Ok(()),
                }
            }
            if is_old {
                let silence = self.silence.as_deref().map(|why| (why, self.heard.elapsed().as_secs()));
                let scene = Scene { model: self.model.as_ref(), address: &self.address, silence, view: &self.view };
                terminal
                    .draw(|frame| draw::draw(&scene, frame.area(), frame.buffer_mut()))
                    .context("cannot write to the terminal")?;
                is_old = false;
            }
            if !event::poll(LOOK_EVERY).context("cannot read the terminal")? {
                continue;
            }
            is_old = true;
            if let Event::Key(key) = event::read().context("cannot read the terminal")?
                && key.kind != KeyEventKind::Release
            {
                let empty = Model::default();
                match self.view.key(key, self.model.as_ref().unwrap_or(&empty)) {
                    Some(Action::Quit) => return Ok(()),
                    Some(Action::Give(order, target)) => {
                        // The other end is gone only if that thread panicked, and then the silence says so.
                        let _ = orders.send((order, target));
                    }
                    None => {}
                }
            }
        }
    }

    fn take(&mut self, status: Result<Value, String>) {
        match status {
            Ok(status) => {
                self.heard = Instant::now();
                self.silence = None;
                if !self.view.paused {
                    self.model = Some(Model::of_status(&status));
                }
            }
            Err(why) => self.silence = Some(why),
        }
    }
}
