//! PURE. What the operator of `preface top` has chosen: rows, order, filter, questions; and what a key does to it.

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::model::{Model, Numbers, Pool, Upstream};

/// A filter longer than a line is a mistake.
const FILTER_CHARS_MAX: usize = 40;
/// Rows that a page key moves.
const PAGE: usize = 10;

/// The chosen view.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// In which order the rows stand.
    pub sort: Sort,
    /// Only rows that contain it.
    pub filter: String,
    /// The chosen row; it stays when rows move.
    pub selected: Option<Target>,
    /// What keys mean now.
    pub mode: Mode,
    /// Nothing new is shown.
    pub paused: bool,
    /// All percentiles of the chosen row are shown.
    pub is_open: bool,
    /// What became of the last order; shown until the next key.
    pub said: Option<Result<String, String>>,
}

/// The order of the rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sort {
    /// Upstreams below their pool.
    #[default]
    Pool,
    /// What is in trouble first.
    State,
    /// Most open connections first.
    Open,
    /// Most new connections first.
    New,
    /// Slowest answer first.
    Slow,
    /// Most failing first.
    Failed,
}

/// What keys mean.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Keys are commands.
    #[default]
    Rows,
    /// Keys are typed into the filter.
    Filter,
    /// An order waits for a yes.
    Confirm(Order, Target),
    /// The keys are explained.
    Help,
}

/// An upstream, or all of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Name of the pool.
    pub pool: String,
    /// `None`: all of it.
    pub address: Option<String>,
}

/// What may be ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Nothing new.
    Drain,
    /// Nothing new, and what is open is reset.
    Disable,
    /// As configured.
    Enable,
}

/// What a key asks of the program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// End.
    Quit,
    /// Order this of the running process.
    Give(Order, Target),
}

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub enum Row<'a> {
    /// A pool, above its upstreams.
    Pool(&'a Pool),
    /// An upstream.
    Upstream(&'a Pool, &'a Upstream),
}

impl Row<'_> {
    /// What an order for this row means.
    pub fn target(&self) -> Target {
        match self {
            Row::Pool(pool) => Target { pool: pool.name.clone(), address: None },
            Row::Upstream(pool, upstream) => {
                Target { pool: pool.name.clone(), address: Some(upstream.address.clone()) }
            }
        }
    }

    /// Its numbers.
    pub fn numbers(&self) -> &Numbers {
        match self {
            Row::Pool(pool) => &pool.numbers,
            Row::Upstream(_, upstream) => &upstream.numbers,
        }
    }
}

impl Sort {
    const ALL: [Sort; 6] = [Sort::Pool, Sort::State, Sort::Open, Sort::New, Sort::Slow, Sort::Failed];

    /// Its word on the screen.
    pub fn as_str(self) -> &'static str {
        match self {
            Sort::Pool => "pool",
            Sort::State => "state",
            Sort::Open => "open",
            Sort::New => "new",
            Sort::Slow => "answer",
            Sort::Failed => "failed",
        }
    }

    fn next(self) -> Sort {
        let place = Sort::ALL.iter().position(|sort| *sort == self).unwrap_or(0);
        Sort::ALL[(place + 1) % Sort::ALL.len()]
    }

    /// Smaller stands higher.
    fn rank(self, upstream: &Upstream) -> f64 {
        let numbers = &upstream.numbers;
        let most = |value: Option<f64>| -value.unwrap_or(-1.0);
        match self {
            Sort::Pool => 0.0,
            Sort::State if upstream.health == "unhealthy" => 0.0,
            Sort::State if !upstream.slow.is_empty() || upstream.is_header_rejected => 0.5,
            Sort::State if upstream.admin != "enabled" => 1.0,
            Sort::State if upstream.health != "healthy" => 2.0,
            Sort::State => 3.0,
            Sort::Open => most(numbers.open.map(|open| open as f64)),
            Sort::New => most(numbers.rates.connections),
            Sort::Slow => most(numbers.latency.answer()[1]),
            Sort::Failed => {
                most(numbers.rates.failures) * 1e9 + most(numbers.connect_failures.map(|count| count as f64))
            }
        }
    }
}

impl Order {
    /// As in the admin API and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Order::Drain => "drain",
            Order::Disable => "disable",
            Order::Enable => "enable",
        }
    }

    /// What it does.
    pub fn meaning(self) -> &'static str {
        match self {
            Order::Drain => "open connections stay",
            Order::Disable => "open connections are reset now",
            Order::Enable => "it serves as its health allows",
        }
    }
}

impl View {
    /// The rows, in their order.
    pub fn rows<'a>(&self, model: &'a Model) -> Vec<Row<'a>> {
        let mut rows = Vec::new();
        for pool in &model.pools {
            let wanted = pool.upstreams.iter().filter(|upstream| self.shows(pool, upstream));
            let upstreams: Vec<Row<'a>> = wanted.map(|upstream| Row::Upstream(pool, upstream)).collect();
            if self.sort == Sort::Pool && !upstreams.is_empty() {
                rows.push(Row::Pool(pool));
            }
            rows.extend(upstreams);
        }
        if self.sort != Sort::Pool {
            let rank = |row: &Row| match row {
                Row::Pool(_) => 0.0,
                Row::Upstream(_, upstream) => self.sort.rank(upstream),
            };
            rows.sort_by(|one, other| rank(one).total_cmp(&rank(other)));
        }
        rows
    }

    /// Names are found anywhere; states from their beginning: "healthy" must not find "unhealthy".
    fn shows(&self, pool: &Pool, upstream: &Upstream) -> bool {
        let wanted = self.filter.to_lowercase();
        let names = [&pool.name, &upstream.address, &upstream.health_reason];
        names.iter().any(|name| name.to_lowercase().contains(&wanted))
            || [&upstream.health, &upstream.admin].iter().any(|state| state.starts_with(&wanted))
    }

    /// Where the chosen row stands now: the first one if it is gone.
    pub fn selected_index(&self, rows: &[Row]) -> usize {
        let chosen = self.selected.as_ref();
        rows.iter().position(|row| Some(&row.target()) == chosen).unwrap_or(0)
    }

    /// A key was pressed.
    pub fn key(&mut self, key: KeyEvent, model: &Model) -> Option<Action> {
        self.said = None;
        if key.modifiers.contains(KeyModifiers::CONTROL) && matches!(key.code, KeyCode::Char('c' | 'd')) {
            return Some(Action::Quit);
        }
        match std::mem::take(&mut self.mode) {
            Mode::Rows => self.command(key.code, model),
            Mode::Filter => {
                self.type_filter(key.code);
                None
            }
            Mode::Confirm(order, target) => match key.code {
                KeyCode::Char('y' | 'Y') | KeyCode::Enter => Some(Action::Give(order, target)),
                KeyCode::Char('n' | 'N' | 'q') | KeyCode::Esc => None,
                _ => {
                    self.mode = Mode::Confirm(order, target);
                    None
                }
            },
            Mode::Help => None,
        }
    }

    fn type_filter(&mut self, code: KeyCode) {
        match code {
            KeyCode::Enter => return,
            KeyCode::Esc => return self.filter.clear(),
            KeyCode::Backspace => drop(self.filter.pop()),
            KeyCode::Char(c) if self.filter.chars().count() < FILTER_CHARS_MAX => self.filter.push(c),
            _ => {}
        }
        self.mode = Mode::Filter;
    }

    fn command(&mut self, code: KeyCode, model: &Model) -> Option<Action> {
        match code {
            KeyCode::Char('q') => return Some(Action::Quit),
            KeyCode::Char('?' | 'h') | KeyCode::F(1) => self.mode = Mode::Help,
            KeyCode::Char('/') => self.mode = Mode::Filter,
            KeyCode::Char('l') | KeyCode::Enter => self.is_open = !self.is_open,
            KeyCode::Char('s') => self.sort = self.sort.next(),
            KeyCode::Char('p' | ' ') => self.paused = !self.paused,
            KeyCode::Esc => self.filter.clear(),
            KeyCode::Up | KeyCode::Char('k') => self.step(model, |at| at.saturating_sub(1)),
            KeyCode::Down | KeyCode::Char('j') => self.step(model, |at| at + 1),
            KeyCode::PageUp => self.step(model, |at| at.saturating_sub(PAGE)),
            KeyCode::PageDown => self.step(model, |at| at + PAGE),
            KeyCode::Home | KeyCode::Char('g') => self.step(model, |_| 0),
            KeyCode::End | KeyCode::Char('G') => self.step(model, |_| usize::MAX),
            KeyCode::Char('d') => self.confirm(Order::Drain, model),
            KeyCode::Char('x') => self.confirm(Order::Disable, model),
            KeyCode::Char('e') => self.confirm(Order::Enable, model),
            _ => {}
        }
        None
    }

    fn step(&mut self, model: &Model, to: impl Fn(usize) -> usize) {
        let rows = self.rows(model);
        let at = to(self.selected_index(&rows)).min(rows.len().saturating_sub(1));
        self.selected = rows.get(at).map(Row::target);
    }

    fn confirm(&mut self, order: Order, model: &Model) {
        let rows = self.rows(model);
        if let Some(row) = rows.get(self.selected_index(&rows)) {
            self.mode = Mode::Confirm(order, row.target());
        }
    }
}
