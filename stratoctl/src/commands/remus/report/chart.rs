//! The picture: a panel for each figure, below each other, over the same time.
use std::error::Error;

use anyhow::anyhow;
use plotters::{
    coord::Shift,
    prelude::{
        ChartBuilder, Color as _, DrawingArea, IntoDrawingArea as _, IntoFont as _, LineSeries,
        RGBColor, SVGBackend, Text,
    },
    style::{TRANSPARENT, WHITE},
};
use qmp::schema::ReplicationEpoch;

const WIDTH: u32 = 960;
/// Height of the lines at the top.
const HEADER: u32 = 76;
const PANEL: u32 = 150;
const MARGIN: i32 = 16;
/// Room for the numbers at the left of each panel.
const LABELS: u32 = 64;
/// Points in a panel: more could not be told apart.
const POINTS: usize = 800;
const FONT: &str = "sans-serif";
const LINE: RGBColor = RGBColor(0x1b, 0x6c, 0xa8);
const GRID: RGBColor = RGBColor(0xdd, 0xdd, 0xdd);

/// A panel: its title, and the value of a checkpoint, which may not be known yet.
type Panel = (&'static str, fn(&ReplicationEpoch) -> Option<f64>);

const PANELS: [Panel; 5] = [
    ("Period, ms", |e| e.period_us.map(thousandth)),
    ("Pause, ms", |e| Some(thousandth(e.pause_us))),
    ("Dirty pages", |e| Some(e.dirty_pages as f64)),
    ("Held output, KiB", |e| Some(e.held_bytes as f64 / 1024.0)),
    ("Lag of output, ms", |e| e.commit_lag_us.map(thousandth)),
];

fn thousandth(number: u64) -> f64 {
    number as f64 / 1000.0
}

/// Draw these checkpoints of `domain`, oldest first; `about` says when, and with which versions.
///
/// # Errors
/// The library cannot.
pub fn draw(domain: &str, about: &str, epochs: &[ReplicationEpoch]) -> anyhow::Result<String> {
    let mut svg = String::new();
    let height = HEADER + PANEL * PANELS.len() as u32 + MARGIN.unsigned_abs();
    let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
    paint(&root, domain, about, epochs).map_err(|e| anyhow!("{e}"))?;
    drop(root);
    Ok(svg)
}

fn paint(
    root: &DrawingArea<SVGBackend<'_>, Shift>,
    domain: &str,
    about: &str,
    epochs: &[ReplicationEpoch],
) -> Result<(), Box<dyn Error>> {
    root.fill(&WHITE)?;
    let last = epochs.last().map_or(0, |epoch| epoch.at_us);
    let first = epochs.first().map_or(0, |epoch| epoch.at_us);
    let seconds = (last.saturating_sub(first) as f64 / 1e6).max(0.001);
    let each = epochs.len().div_ceil(POINTS).max(1);
    let counted = match each {
        1 => format!("{} checkpoints", epochs.len()),
        each => format!("{} checkpoints; each point is the largest of {each}", epochs.len()),
    };
    let title = format!("Protection of {domain}: the last {seconds:.0} s");
    for (y, size, words) in [(14, 22, title.as_str()), (42, 13, about), (58, 13, &counted)] {
        root.draw(&Text::new(words.to_owned(), (MARGIN, y), (FONT, size).into_font()))?;
    }
    let (_, below) = root.split_vertically(HEADER);
    for (area, (title, value)) in below.split_evenly((PANELS.len(), 1)).iter().zip(PANELS) {
        let points: Vec<(f64, f64)> = epochs
            .chunks(each)
            .filter_map(|chunk| {
                let most = chunk.iter().filter_map(value).reduce(f64::max)?;
                let at = chunk.first()?.at_us;
                Some((-(last.saturating_sub(at) as f64) / 1e6, most))
            })
            .collect();
        // A number above the largest value; an axis without length could not be drawn.
        let top = points.iter().map(|(_, y)| *y).fold(0.0, f64::max).max(0.001) * 1.1;
        let mut chart = ChartBuilder::on(area)
            .caption(title, (FONT, 14))
            .margin_right(MARGIN)
            .set_left_and_bottom_label_area_size(LABELS)
            .x_label_area_size(22)
            .build_cartesian_2d(-seconds..0.0, 0.0..top)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .x_label_formatter(&|x| format!("{x} s"))
            .y_labels(4)
            .draw()?;
        chart.draw_series(LineSeries::new(points, LINE.stroke_width(1)))?;
    }
    root.present()?;
    Ok(())
}
