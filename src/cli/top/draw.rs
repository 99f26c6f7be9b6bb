//! PURE. The screen of `preface top`, from the top line to the line of keys, in as many columns as there are.

use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span, Text};
use ratatui::widgets::{Block, Clear, Paragraph, Widget, Wrap};

use super::model::{FIGURES, KINDS, Model, Numbers, Pool, Problem, Upstream};
use super::view::{Mode, Order, Row, Sort, Target, View};
use super::words::{bytes, count, milliseconds, rate, span, tail, wrap};

/// Problems above the table take at most this part of the screen; the rest is counted.
const PROBLEMS_PART: usize = 3;
/// An upstream's name has at least this much room.
const NAME_WIDTH_MIN: usize = 21;

const GOOD: Style = Style::new().fg(Color::Green);
const BAD: Style = Style::new().fg(Color::Red).add_modifier(Modifier::BOLD);
const WARN: Style = Style::new().fg(Color::Yellow);
const QUIET: Style = Style::new().add_modifier(Modifier::DIM);
const STRONG: Style = Style::new().add_modifier(Modifier::BOLD);

/// Everything that is on the screen.
#[derive(Clone, Copy, Debug)]
pub struct Scene<'a> {
    /// What the process said last; none before its first answer.
    pub model: Option<&'a Model>,
    /// Where it is.
    pub address: &'a str,
    /// Why there is no newer answer, and for how many seconds.
    pub silence: Option<(&'a str, u64)>,
    /// What the operator chose.
    pub view: &'a View,
}

/// A column of the table.
struct Column {
    name: &'static str,
    width: usize,
    /// Shown where the terminal has at least so many columns.
    from: usize,
    of: fn(&Numbers) -> String,
}

const COLUMNS: [Column; 9] = [
    Column { name: "OPEN", width: 5, from: 0, of: |numbers| count(numbers.open) },
    Column { name: "NEW/s", width: 5, from: 0, of: |numbers| rate(numbers.rates.connections) },
    Column { name: "IN/s", width: 8, from: 100, of: |numbers| bytes(numbers.rates.bytes_in) },
    Column { name: "OUT/s", width: 8, from: 100, of: |numbers| bytes(numbers.rates.bytes_out) },
    Column { name: "CONN50", width: 6, from: 116, of: |numbers| milliseconds(numbers.latency.connect[0]) },
    Column { name: "CONN99", width: 6, from: 0, of: |numbers| milliseconds(numbers.latency.connect[1]) },
    Column { name: "ANSW50", width: 6, from: 116, of: |numbers| milliseconds(numbers.latency.answer()[0]) },
    Column { name: "ANSW99", width: 6, from: 0, of: |numbers| milliseconds(numbers.latency.answer()[1]) },
    Column { name: "FAIL/s", width: 6, from: 0, of: |numbers| rate(numbers.rates.failures) },
];

/// The screen.
pub fn draw(scene: &Scene, area: Rect, buffer: &mut Buffer) {
    let rows = scene.model.map(|model| scene.view.rows(model)).unwrap_or_default();
    let problems = problem_lines(scene, usize::from(area.width), usize::from(area.height) / PROBLEMS_PART);
    let details = scene.model.map(|model| details(scene.view, model, &rows, area.width)).unwrap_or_default();
    let heights = [2, problems.len() as u16, 1];
    let [top, middle, head, table, detail, keys] = Layout::vertical([
        Constraint::Length(heights[0]),
        Constraint::Length(heights[1]),
        Constraint::Length(heights[2]),
        Constraint::Fill(1),
        Constraint::Length(details.len() as u16),
        Constraint::Length(1),
    ])
    .areas(area);
    Text::from(top_lines(scene)).render(top, buffer);
    Text::from(problems).render(middle, buffer);
    if scene.model.is_some() {
        header_line(scene, head.width).render(head, buffer);
    }
    draw_rows(scene, &rows, table, buffer);
    Text::from(details).render(detail, buffer);
    key_line(scene).render(keys, buffer);
    if scene.view.mode == Mode::Help {
        draw_help(area, buffer);
    }
}

/// How high a screen of this width must be to show everything.
pub fn height(scene: &Scene, width: u16) -> u16 {
    let rows = scene.model.map_or(0, |model| scene.view.rows(model).len());
    let problems = problem_lines(scene, usize::from(width), usize::MAX).len();
    let around = foot_height(scene, width) + 5;
    u16::try_from((rows + problems + around).max(problems * PROBLEMS_PART)).unwrap_or(u16::MAX)
}

fn top_lines(scene: &Scene) -> Vec<Line<'static>> {
    let mut first = vec![Span::styled("preface", STRONG), Span::raw(format!(" {}", scene.address))];
    let Some(model) = scene.model else {
        return vec![Line::from(first)];
    };
    if let (Some(now), Some(started)) = (model.now, model.started) {
        let up = format!("  {}  up {}  {}Z  ", model.version, span(now.seconds_since(started)), now.clock());
        first.push(Span::raw(up));
    }
    let (serving, upstreams) = model.upstreams();
    let style = if model.problems.iter().any(|problem| problem.bad) { BAD } else { GOOD };
    first.push(Span::styled(format!("{serving}/{upstreams} serving"), style));
    if scene.view.paused {
        first.push(Span::styled("  PAUSED", WARN));
    }
    let max = model.open_max.map(|max| format!(" of {}", count(Some(max)))).unwrap_or_default();
    let mut second = vec![
        Span::raw(format!("open {}{max}", count(model.open))),
        Span::raw(format!("   new {}/s", rate(model.rates.connections))),
        Span::raw(format!("   in {}/s", bytes(model.rates.bytes_in))),
        Span::raw(format!("   out {}/s", bytes(model.rates.bytes_out))),
        Span::raw("   failed "),
        failing(&format!("{}/s", rate(model.rates.failures)), model.rates.failures),
    ];
    if let (Some(datagrams_in), Some(datagrams_out)) = (model.rates.datagrams_in, model.rates.datagrams_out)
        && datagrams_in + datagrams_out > 0.0
    {
        let (into, out) = (rate(Some(datagrams_in)), rate(Some(datagrams_out)));
        second.push(Span::raw(format!("   dgrams {into}/s in {out}/s out")));
    }
    vec![Line::from(first), Line::from(second)]
}

fn failing(text: &str, value: Option<f64>) -> Span<'static> {
    Span::styled(text.to_owned(), if value.is_some_and(|value| value > 0.0) { BAD } else { Style::new() })
}

fn problem_lines(scene: &Scene, width: usize, lines_max: usize) -> Vec<Line<'static>> {
    let mut lines = Vec::new();
    if let Some((why, seconds)) = scene.silence {
        let old = if scene.model.is_some() { format!("no answer for {}: ", span(seconds)) } else { String::new() };
        lines.push(Line::styled(format!("{old}{why}"), BAD));
        lines.push(Line::styled("still trying, every second", WARN));
    }
    let problems = scene.model.map(|model| &model.problems[..]).unwrap_or_default();
    let wrapped = |with_advice: bool| problems.iter().map(move |problem| problem_words(problem, width, with_advice));
    // What is wrong is more than what to do about it, where there is no room for both.
    let has_room = wrapped(true).map(|lines| lines.len()).sum::<usize>() <= lines_max;
    let mut left = problems.len();
    for words in wrapped(has_room) {
        // One line is for those that are not shown.
        if lines.len() + words.len() + usize::from(left > 1) > lines_max && !has_room {
            break;
        }
        lines.extend(words);
        left -= 1;
    }
    if left > 0 {
        lines.push(Line::styled(format!("  and {left} more; preface top --once lists all"), QUIET));
    }
    lines
}

/// A problem in as many lines as it takes, and what to do about it.
fn problem_words(problem: &Problem, width: usize, with_advice: bool) -> Vec<Line<'static>> {
    let (mark, style) = if problem.bad { ("! ", BAD) } else { ("- ", WARN) };
    let mut lines: Vec<Line> =
        wrap(&problem.text, width, mark).into_iter().map(|line| Line::styled(line, style)).collect();
    if with_advice && !problem.advice.is_empty() {
        lines.extend(wrap(&problem.advice, width, "    ").into_iter().map(Line::raw));
    }
    lines
}

fn columns(width: u16) -> impl Iterator<Item = &'static Column> {
    COLUMNS.iter().filter(move |column| usize::from(width) >= column.from)
}

fn name_width(width: u16) -> usize {
    let others: usize = columns(width).map(|column| column.width + 1).sum();
    usize::from(width).saturating_sub(others + 2 + " unhealthy draining".len()).max(NAME_WIDTH_MIN)
}

fn header_line(scene: &Scene, width: u16) -> Line<'static> {
    let name = if scene.view.sort == Sort::Pool { "POOL / UPSTREAM" } else { "UPSTREAM" };
    let mut text = format!("  {name:<0$} HEALTH    ADMIN   ", name_width(width));
    for column in columns(width) {
        text += &format!(" {:>1$}", column.name, column.width);
    }
    Line::styled(text, Style::new().add_modifier(Modifier::UNDERLINED))
}

fn draw_rows(scene: &Scene, rows: &[Row], area: Rect, buffer: &mut Buffer) {
    let selected = scene.view.selected_index(rows);
    let room = usize::from(area.height);
    // The chosen one stays in sight, with one row below it where there is one.
    let first = (selected + 2).min(rows.len()).saturating_sub(room);
    for (at, row) in rows.iter().enumerate().skip(first).take(room) {
        let line = row_line(scene, row, area.width);
        let place = Rect { y: area.y + (at - first) as u16, height: 1, ..area };
        line.render(place, buffer);
        if at == selected {
            buffer[(place.x, place.y)].set_symbol(">");
            buffer.set_style(place, Style::new().add_modifier(Modifier::REVERSED));
        }
    }
    if rows.is_empty() && scene.model.is_some() {
        let why =
            if scene.view.filter.is_empty() { "no upstreams" } else { "nothing matches the filter; Esc clears it" };
        Line::styled(format!("  {why}"), QUIET).render(area, buffer);
    }
}

fn row_line(scene: &Scene, row: &Row, width: u16) -> Line<'static> {
    let room = name_width(width);
    let mut spans = match row {
        Row::Pool(pool) => pool_spans(pool, room),
        Row::Upstream(pool, upstream) => {
            let name = match scene.view.sort {
                Sort::Pool => format!("  {}", tail(&upstream.address, room - 2)),
                _ => tail(&format!("{} {}", pool.name, upstream.address), room),
            };
            upstream_spans(&name, upstream, room)
        }
    };
    let numbers = row.numbers();
    let slow = match row {
        Row::Upstream(_, upstream) if upstream.slow == "connect" => "CONN",
        Row::Upstream(_, upstream) if upstream.slow == "first_byte" => "BYTE",
        _ => "-",
    };
    for column in columns(width) {
        let text = format!(" {:>1$}", (column.of)(numbers), column.width);
        spans.push(match column.name {
            "FAIL/s" => failing(&text, numbers.rates.failures),
            name if name.starts_with(slow) => Span::styled(text, BAD),
            _ => Span::raw(text),
        });
    }
    Line::from(spans)
}

fn pool_spans(pool: &Pool, room: usize) -> Vec<Span<'static>> {
    let all = pool.upstreams.len();
    let style = match pool.serving {
        0 => BAD,
        serving if serving < all => WARN,
        _ => GOOD,
    };
    let state = if pool.usable { format!("{}/{all} serving", pool.serving) } else { "no usable".to_owned() };
    vec![
        Span::styled(format!("  {:<room$} ", tail(&pool.name, room)), STRONG),
        Span::styled(format!("{state:<18}"), style),
    ]
}

fn upstream_spans(name: &str, upstream: &Upstream, room: usize) -> Vec<Span<'static>> {
    let has_fault = !upstream.slow.is_empty() || upstream.is_header_rejected;
    let (mark, health) = match upstream.health.as_str() {
        "unhealthy" => ("!", BAD),
        "healthy" if has_fault => ("!", GOOD),
        "healthy" => (" ", GOOD),
        _ => (" ", QUIET),
    };
    let admin = if upstream.admin == "enabled" { QUIET } else { WARN };
    vec![
        Span::styled(format!(" {mark}"), BAD),
        Span::raw(format!("{name:<room$} ")),
        Span::styled(format!("{:<9} ", upstream.health), health),
        Span::styled(format!("{:<8}", upstream.admin), admin),
    ]
}

/// Lines below the table: the chosen row in words, and the keys.
pub fn foot_height(scene: &Scene, width: u16) -> usize {
    let details = scene.model.map(|model| details(scene.view, model, &scene.view.rows(model), width));
    details.unwrap_or_default().len() + 1
}

/// The chosen row in words, and what to do about it.
fn details(view: &View, model: &Model, rows: &[Row], width: u16) -> Vec<Line<'static>> {
    let Some(row) = rows.get(view.selected_index(rows)) else { return Vec::new() };
    let both = |of: [Option<f64>; 2]| format!("{}/{}", milliseconds(of[0]), milliseconds(of[1]));
    let numbers = row.numbers();
    let mut first = String::new();
    if let Row::Upstream(pool, upstream) = row {
        let Upstream { address, header, health, health_reason, .. } = upstream;
        let since = model.since(upstream.health_since);
        first = format!("{} {address}, header {header}: {health} {since}, {health_reason}", pool.name);
        if upstream.admin != "enabled" && !upstream.admin.is_empty() {
            let since = model.since(upstream.admin_since);
            first += &format!("; {} {since} by {}", upstream.admin, upstream.admin_by);
        }
    } else if let Row::Pool(pool) = row {
        first = format!("pool {}, {} upstreams", pool.name, pool.upstreams.len());
    }
    let mut second = format!(
        "last minute p50/p99: connect {}, first byte {}",
        both(numbers.latency.connect),
        both(numbers.latency.first_byte)
    );
    if numbers.latency.round_trip[0].is_some() {
        second = second.replace("connect -/-, first byte -/-", "");
        second += if second.ends_with(' ') { "" } else { ", " };
        second += &format!("UDP round trip {}", both(numbers.latency.round_trip));
    }
    second += &format!("; {} failed connects", count(numbers.connect_failures));
    let target = row.target();
    let is_meant = |problem: &&Problem| {
        problem.pool == target.pool && problem.upstream == target.address.as_deref().unwrap_or_default()
    };
    let advice =
        model.problems.iter().filter(is_meant).map(|problem| &problem.advice).find(|advice| !advice.is_empty());
    let advice = advice.map(|advice| wrap(advice, usize::from(width), "> ")).unwrap_or_default();
    let mut lines = vec![Line::raw(first)];
    match view.is_open {
        true => lines.extend(time_lines(numbers)),
        false => lines.push(Line::styled(second, QUIET)),
    }
    lines.extend(advice.into_iter().map(|line| Line::styled(line, WARN)));
    lines
}

/// Every figure of what was measured: a kind of durations in a line, which fits into 80 columns.
fn time_lines(numbers: &Numbers) -> Vec<Line<'static>> {
    let kinds = KINDS.iter().zip(&numbers.latency.times);
    let measured = kinds.filter(|(_, times)| times.last_minute.iter().chain(&times.since_start).any(Option::is_some));
    let lines = measured.map(|((_, name), times)| {
        let figures = times.last_minute.iter().chain(&times.since_start);
        let figures: String = figures.map(|figure| format!(" {:>6}", milliseconds(*figure))).collect();
        Line::raw(format!("{name:<10}{figures}"))
    });
    let lines: Vec<Line> = lines.collect();
    if lines.is_empty() {
        return vec![Line::styled("nothing measured yet", QUIET)];
    }
    let names: String = FIGURES.iter().chain(&FIGURES).map(|name| format!(" {name:>6}")).collect();
    let head = [format!("{:13}{:35}{}", "", "last minute", "since the start"), format!("{:10}{names}", "")];
    head.into_iter().map(|line| Line::styled(line, QUIET)).chain(lines).collect()
}

fn key_line(scene: &Scene) -> Line<'static> {
    let view = scene.view;
    match (&view.mode, &view.said) {
        (Mode::Confirm(order, target), _) => {
            let question = format!("y/n  {}? {}", title(*order, target), order.meaning());
            Line::styled(question, WARN.add_modifier(Modifier::REVERSED))
        }
        (Mode::Filter, _) => Line::raw(format!("filter: {}_   Enter keeps it, Esc clears it", view.filter)),
        (_, Some(Ok(said))) => Line::styled(said.clone(), GOOD),
        (_, Some(Err(said))) => Line::styled(said.clone(), BAD),
        _ => {
            // Who filters needs to see by what; there is no room for both.
            let (times, filter) = match view.filter.as_str() {
                "" => ("  l times", String::new()),
                filter => ("", format!(": {filter}")),
            };
            let sort = view.sort.as_str();
            let text = format!("? help  q quit  d drain  x disable  e enable{times}  s sort: {sort}  / filter{filter}");
            Line::styled(text, QUIET)
        }
    }
}

/// "drain 10.0.0.30:80 of ingress"
pub fn title(order: Order, target: &Target) -> String {
    match &target.address {
        Some(address) => format!("{} {address} of {}", order.as_str(), target.pool),
        None => format!("{} all of pool {}", order.as_str(), target.pool),
    }
}

fn draw_help(area: Rect, buffer: &mut Buffer) {
    let text = "\
up down j k   choose a row      PgUp PgDn Home End
d             drain             nothing new; open connections stay
x             disable           nothing new; open ones are reset now
e             enable            take both back
              each asks first; on a pool's row: all of it
l Enter       times             of the row: p50 to max, minute and start
s             sort              pool, state, open, new, answer, failed
/             filter            pool, address, state, reason; Esc clears
p             pause             the screen stays as it is
q Ctrl-C      quit

serving: healthy and enabled. OPEN, NEW: connections and UDP sessions.
CONN99, ANSW99: p99 of the last minute of connects and of answers (from
accept to first byte; UDP: from question to reply; the slower one).
FAIL/s: failed connects; in the second line every end not regular.";
    let [width, height] = [76, 17].map(|size: u16| size);
    let place = Rect {
        x: area.x + area.width.saturating_sub(width) / 2,
        y: area.y + area.height.saturating_sub(height) / 2,
        width: width.min(area.width),
        height: height.min(area.height),
    };
    Clear.render(place, buffer);
    let block = Block::bordered().title(" keys; any key closes ");
    Paragraph::new(text).wrap(Wrap { trim: false }).block(block).render(place, buffer);
}
