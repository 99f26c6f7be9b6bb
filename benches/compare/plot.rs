//! From samples to a picture: a panel for each row, a bar for each candidate, in SVG that needs nothing else.

use std::fmt::Write;

use super::peers::Kind;
use super::report::{Report, Spread, number};
use super::run::Result;

const WIDTH: f64 = 1120.0;
const MARGIN: f64 = 28.0;
const GAP: f64 = 24.0;
const COLUMNS: usize = 2;
const PANEL: f64 = (WIDTH - 2.0 * MARGIN - GAP) / COLUMNS as f64;
const LABELS: f64 = 118.0;
const VALUES: f64 = 66.0;
const LINE: f64 = 22.0;
const PANEL_HEAD: f64 = 52.0;
const PANEL_FOOT: f64 = 14.0;

/// The whole picture.
pub fn svg(report: &Report) -> String {
    let mut body = String::new();
    let mut top = MARGIN + 84.0;
    for pair in report.results.chunks(COLUMNS) {
        let height = pair.iter().map(height).fold(0.0, f64::max);
        for (column, result) in pair.iter().enumerate() {
            panel(&mut body, result, MARGIN + column as f64 * (PANEL + GAP), top, height);
        }
        top += height + GAP;
    }
    let total = top - GAP + MARGIN;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {total}\" width=\"{WIDTH}\" height=\"{total}\" \
         font-family=\"system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif\" font-size=\"13\">\n\
         <rect width=\"{WIDTH}\" height=\"{total}\" fill=\"#f4f5f7\"/>\n"
    );
    let baseline = MARGIN + 18.0;
    let _ = writeln!(
        text,
        "<text x=\"{MARGIN}\" y=\"{baseline}\" font-size=\"22\" font-weight=\"600\" fill=\"#16202c\">preface beside \
         others: less is better</text>"
    );
    let runs = if report.repetitions == 1 { "1 run".to_owned() } else { format!("{} runs", report.repetitions) };
    let place = format!("{} · {} · median of {runs}, whiskers: least and greatest", report.date, report.place());
    for (line, words) in [place, report.programs()].iter().enumerate() {
        let y = baseline + 25.0 + line as f64 * 19.0;
        let _ = writeln!(text, "<text x=\"{MARGIN}\" y=\"{y}\" fill=\"#4a5765\">{}</text>", escape(words));
    }
    text + &body + "</svg>\n"
}

fn height(result: &Result) -> f64 {
    PANEL_HEAD + bars(result).len() as f64 * LINE + PANEL_FOOT
}

/// Label, figure or failure, and whose it is.
fn bars(result: &Result) -> Vec<(String, std::result::Result<Spread, &str>, Kind)> {
    let key = result.row.work.metrics()[0].key;
    let mut bars = Vec::new();
    for entry in &result.entries {
        let figure = match (&entry.failure, entry.spread(key)) {
            (Some(_), _) => Err("failed"),
            (None, Some(spread)) => Ok(spread),
            // The direct run has no candidate that could use a processor.
            (None, None) => continue,
        };
        bars.push((entry.contestant.label(), figure, entry.contestant.kind));
    }
    bars
}

fn panel(text: &mut String, result: &Result, left: f64, top: f64, height: f64) {
    let _ = writeln!(
        text,
        "<rect x=\"{left}\" y=\"{top}\" width=\"{PANEL}\" height=\"{height}\" rx=\"8\" fill=\"#ffffff\" \
         stroke=\"#dbe0e6\"/>"
    );
    let (x, title, unit) = (left + 14.0, top + 23.0, top + 40.0);
    let _ = writeln!(
        text,
        "<text x=\"{x}\" y=\"{title}\" font-size=\"14.5\" font-weight=\"600\" fill=\"#16202c\">{}</text>",
        escape(&result.row.title)
    );
    let words = result.row.work.metrics()[0].title;
    let _ = writeln!(text, "<text x=\"{x}\" y=\"{unit}\" font-size=\"12\" fill=\"#66737f\">{}</text>", escape(words));
    let bars = bars(result);
    let greatest = bars.iter().filter_map(|bar| bar.1.ok()).map(|spread| spread.max).fold(0.0, f64::max);
    let zero = left + 14.0 + LABELS;
    let scale = (PANEL - 28.0 - LABELS - VALUES) / if greatest > 0.0 { greatest } else { 1.0 };
    for (line, (label, figure, kind)) in bars.iter().enumerate() {
        let middle = top + PANEL_HEAD + (line as f64 + 0.5) * LINE;
        let (end, baseline) = (zero - 8.0, middle + 4.5);
        let is_preface = *kind == Kind::Preface;
        let weight = if is_preface { " font-weight=\"600\"" } else { "" };
        let _ = writeln!(
            text,
            "<text x=\"{end}\" y=\"{baseline}\" text-anchor=\"end\" fill=\"#16202c\"{weight}>{}</text>",
            escape(label)
        );
        let Ok(spread) = figure else {
            let _ = writeln!(text, "<text x=\"{zero}\" y=\"{baseline}\" fill=\"#b3261e\">failed</text>");
            continue;
        };
        let length = (spread.median * scale).max(1.0);
        let fill = match kind {
            Kind::Preface => "#1f6feb",
            Kind::PrefaceLog | Kind::Bare => "#9dc1f5",
            _ => "#a9b4c0",
        };
        let y = middle - 7.0;
        let _ = writeln!(
            text,
            "<rect x=\"{zero}\" y=\"{y:.1}\" width=\"{length:.1}\" height=\"14\" rx=\"2\" fill=\"{fill}\"/>"
        );
        let (least, most) = (zero + spread.min.max(0.0) * scale, zero + spread.max.max(0.0) * scale);
        if most - least > 1.5 {
            whisker(text, least, most, middle);
        }
        let x = zero + length.max(spread.max * scale) + 7.0;
        let _ = writeln!(
            text,
            "<text x=\"{x:.1}\" y=\"{baseline}\" font-size=\"12\" fill=\"#16202c\"{weight}>{}</text>",
            number(spread.median)
        );
    }
}

fn whisker(text: &mut String, least: f64, most: f64, middle: f64) {
    let (up, down) = (middle - 4.0, middle + 4.0);
    let _ = writeln!(
        text,
        "<path d=\"M{least:.1} {up}V{down}M{least:.1} {middle}H{most:.1}M{most:.1} {up}V{down}\" stroke=\"#16202c\" \
         stroke-width=\"1.2\" fill=\"none\"/>"
    );
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
