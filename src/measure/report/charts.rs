//! Charts as SVG, in colours that the page's style sheet replaces by those of its theme.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::{Document, kl};
use crate::error::{Error, Result};
use crate::measure::compare::{MASS_RANGE, N_BINS, Role, Variant};

/// Text and axes.
const INK: RGBColor = RGBColor(1, 1, 1);
/// Lines behind the data.
const GRID: RGBColor = RGBColor(2, 2, 2);
/// Variants on the Pareto front.
const FRONT: RGBColor = RGBColor(3, 3, 3);
/// Other variants.
const REST: RGBColor = RGBColor(4, 4, 4);
/// Yardsticks.
const YARDSTICK: RGBColor = RGBColor(5, 5, 5);
/// The model as trained.
const BASE: RGBColor = RGBColor(6, 6, 6);

/// Smallest divergence that a chart tells from none: below are rounding errors.
const MIN_KL: f64 = 1e-6;

/// Width of a character in a label, in pixels.
const CHAR: f64 = 6.6;
const FONT: i32 = 15;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn failed(e: impl std::fmt::Display) -> Error {
    Error::Runtime(format!("cannot draw a chart: {e}"))
}

fn text(color: RGBColor, h: HPos, v: VPos) -> TextStyle<'static> {
    ("sans-serif", FONT).into_font().color(&color).pos(Pos::new(h, v))
}

/// An SVG of this size, which scales to the page's width.
fn svg(
    (width, height): (u32, u32),
    title: &str,
    draw: impl FnOnce(&Area) -> Result<()>,
) -> Result<String> {
    let mut out = String::new();
    {
        let area = SVGBackend::with_string(&mut out, (width, height)).into_drawing_area();
        draw(&area)?;
        area.present().map_err(failed)?;
    }
    let size = format!("<svg width=\"{width}\" height=\"{height}\"");
    let named = format!("<svg role=\"img\" aria-label=\"{title}\"");
    Ok(out.replacen(&size, &named, 1))
}

/// Powers of ten around some positive numbers.
fn decades(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::MAX, MIN_KL), |(l, h), x| (l.min(x), h.max(x)));
    let power = |x: f64| 10f64.powf(x);
    (
        power(low.min(high).log10().floor()),
        power(high.log10().ceil().max(low.log10().floor() + 1.0)),
    )
}

fn shown_kl(variant: &Variant) -> f64 {
    kl(variant).clamp(MIN_KL, 1e3)
}

/// A number on an axis of divergences.
fn kl_label(x: &f64) -> String {
    match x {
        x if *x <= MIN_KL * 1.01 => "≤1e-6".into(),
        x if *x < 1e-3 => format!("{x:.0e}"),
        x => format!("{x}"),
    }
}

/// Divergence against decoding speed. Circles come in the order of the ranked variants that have a
/// divergence.
pub(super) fn scatter(document: &Document, size: (u32, u32)) -> Result<String> {
    let rows: Vec<_> = document
        .ranked()
        .into_iter()
        .filter(|(rank, v)| rank.is_some() && kl(v).is_finite())
        .collect();
    let (left, right) =
        decades(document.variants.iter().filter(|v| kl(v).is_finite()).map(shown_kl));
    let speed = |v: &Variant, name: &str| v.get(name).unwrap_or(1.0);
    let (low, high) = rows.iter().fold((1.0f64, 1.0f64), |(low, high), (_, v)| {
        let ratio = speed(v, "decode_ratio");
        (low.min(ratio), high.max(ratio))
    });
    let pad = 0.06 * (high - low).max(0.1);
    svg(size, "Quality against decoding speed", |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(8)
            .margin_top(22)
            .margin_right(16)
            .x_label_area_size(46)
            .y_label_area_size(60)
            .build_cartesian_2d((left..right).log_scale(), low - pad..high + pad)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(INK)
            .label_style(text(INK, HPos::Center, VPos::Center))
            .axis_desc_style(text(INK, HPos::Center, VPos::Center))
            .x_desc("KL, nats per token (less is better)")
            .y_desc("decoding speed, ratio (more is better)")
            .x_label_formatter(&kl_label)
            .y_label_formatter(&|y| format!("{y:.2}"))
            .draw()
            .map_err(failed)?;
        let plot = chart.plotting_area();
        for yardstick in document.yardsticks() {
            let x = shown_kl(yardstick);
            let line = [(x, low - pad), (x, high + pad)];
            plot.draw(&PathElement::new(line, YARDSTICK.stroke_width(1))).map_err(failed)?;
        }
        let mut labels = Labels::new(area, plot.get_pixel_range());
        for yardstick in document.yardsticks() {
            let (x, y) = plot.map_coordinate(&(shown_kl(yardstick), high + pad));
            labels.above(yardstick.name.trim_start_matches("as "), (x, y))?;
        }
        // The front is drawn last, so that it lies on top, but circles keep their order.
        let mut points = Vec::new();
        for (rank, v) in &rows {
            let at = (shown_kl(v), speed(v, "decode_ratio"));
            let ends = [speed(v, "decode_ratio_min"), speed(v, "decode_ratio_max")];
            let (color, radius) = match (v.role, rank) {
                (Role::Baseline, _) => (BASE, 6),
                (_, Some(1)) => (FRONT, 5),
                _ => (REST, 4),
            };
            let whisker = ends.map(|y| (at.0, y.clamp(low - pad, high + pad)));
            plot.draw(&PathElement::new(whisker, color.stroke_width(1))).map_err(failed)?;
            points.push((at, color, radius, v, *rank == Some(1)));
        }
        for (at, color, radius, ..) in &points {
            plot.draw(&Circle::new(*at, *radius, color.filled())).map_err(failed)?;
            labels.taken(plot.map_coordinate(at), *radius);
        }
        let named = |first: bool| points.iter().filter(move |p| p.4 == first);
        for (at, color, _, v, is_front) in named(true).chain(named(false)) {
            let color = if *is_front { *color } else { INK };
            labels.beside(&v.name, plot.map_coordinate(at), color)?;
        }
        Ok(())
    })
}

/// Labels that leave each other and the points alone; one that finds no room is left out.
struct Labels<'a, 'b> {
    area: &'a Area<'b>,
    /// Of the plot: left, top, right, bottom.
    room: [f64; 4],
    taken: Vec<[f64; 4]>,
}

impl<'a, 'b> Labels<'a, 'b> {
    fn new(
        area: &'a Area<'b>,
        (x, y): (std::ops::Range<i32>, std::ops::Range<i32>),
    ) -> Labels<'a, 'b> {
        let room = [x.start, y.start, x.end, y.end].map(f64::from);
        Labels { area, room, taken: Vec::new() }
    }

    fn taken(&mut self, (x, y): (i32, i32), radius: i32) {
        self.taken.push([x - radius, y - radius, x + radius, y + radius].map(f64::from));
    }

    fn is_free(&self, b: [f64; 4]) -> bool {
        !self.taken.iter().any(|t| b[0] < t[2] && t[0] < b[2] && b[1] < t[3] && t[1] < b[3])
    }

    fn put(&mut self, name: &str, at: (f64, f64), color: RGBColor) -> Result<()> {
        let style = text(color, HPos::Left, VPos::Center);
        let at = (at.0.round() as i32, at.1.round() as i32);
        self.area.draw(&Text::new(name.to_string(), at, style)).map_err(failed)
    }

    /// A label over the plot's upper edge.
    fn above(&mut self, name: &str, (x, y): (i32, i32)) -> Result<()> {
        let width = CHAR * name.len() as f64;
        let (x, y) = (f64::from(x) - width / 2.0, f64::from(y) - 9.0);
        let place = [x - 2.0, y - 7.0, x + width + 2.0, y + 7.0];
        match self.is_free(place) {
            true => {
                self.taken.push(place);
                self.put(name, (x, y), YARDSTICK)
            }
            false => Ok(()),
        }
    }

    /// A label beside a point.
    fn beside(&mut self, name: &str, (x, y): (i32, i32), color: RGBColor) -> Result<()> {
        let (x, y) = (f64::from(x), f64::from(y));
        let name: String = match name.chars().count() > 24 {
            true => name.chars().take(23).chain(['…']).collect(),
            false => name.into(),
        };
        let width = CHAR * name.chars().count() as f64;
        let places = [
            (x + 8.0, y),
            (x - 8.0 - width, y),
            (x - width / 2.0, y - 13.0),
            (x - width / 2.0, y + 13.0),
            (x + 7.0, y - 10.0),
            (x + 7.0, y + 10.0),
            (x - 7.0 - width, y - 10.0),
            (x - 7.0 - width, y + 10.0),
        ];
        for (left, middle) in places {
            let place = [left, middle - 6.0, left + width, middle + 6.0];
            let inside = place[0] >= self.room[0]
                && place[1] >= self.room[1]
                && place[2] <= self.room[2]
                && place[3] <= self.room[3];
            if inside && self.is_free(place) {
                self.taken.push(place);
                return self.put(&name, (left, middle), color);
            }
        }
        Ok(())
    }
}

/// A bar for what each yardstick costs, with dots for the variants above them.
pub(super) fn yardsticks(document: &Document, width: u32) -> Result<Option<String>> {
    let bars = document.yardsticks();
    if bars.is_empty() {
        return Ok(None);
    }
    let (left, right) = decades(bars.iter().map(|v| shown_kl(v)));
    let rows = bars.len() as i32;
    let size = (width, 26 * rows as u32 + 60);
    let chart = svg(size, "What rounding the weights costs", |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(8)
            .margin_right(60)
            .x_label_area_size(42)
            .y_label_area_size(56)
            .build_cartesian_2d((left..right).log_scale(), rows as f64..0.0)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .disable_y_axis()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(INK)
            .label_style(text(INK, HPos::Center, VPos::Center))
            .axis_desc_style(text(INK, HPos::Center, VPos::Center))
            .x_desc("KL from the model as trained, nats per token")
            .x_label_formatter(&kl_label)
            .draw()
            .map_err(failed)?;
        let plot = chart.plotting_area();
        for (i, bar) in bars.iter().enumerate() {
            let (top, x) = (i as f64, shown_kl(bar));
            let corners = [(left, top + 0.2), (x, top + 0.8)];
            plot.draw(&Rectangle::new(corners, YARDSTICK.filled())).map_err(failed)?;
            let (start, middle) = plot.map_coordinate(&(left, top + 0.5));
            let name = bar.name.trim_start_matches("as ").to_string();
            let style = text(INK, HPos::Right, VPos::Center);
            area.draw(&Text::new(name, (start - 6, middle), style)).map_err(failed)?;
            let (end, _) = plot.map_coordinate(&(x, top));
            let style = text(INK, HPos::Left, VPos::Center);
            let number = super::table::small(kl(bar));
            area.draw(&Text::new(number, (end + 6, middle), style)).map_err(failed)?;
        }
        Ok(())
    });
    chart.map(Some)
}

/// Histograms of row mass and entropy, of a variant over those of the baseline.
pub(super) fn histograms(
    document: &Document,
    variant: &Variant,
    size: (u32, u32),
) -> Result<String> {
    let base = document.baseline();
    svg(size, "Rows by mass and by entropy", |area| {
        let (upper, lower) = area.split_vertically(size.1 / 2);
        let (low, high) = (f64::from(MASS_RANGE.0), f64::from(MASS_RANGE.1));
        let mass = |v: &Variant| v.mass_histogram.clone();
        let entropy = |v: &Variant| v.entropy_histogram.clone();
        let power = |x: &f64| match x {
            x if *x < 0.0 => format!("1/{}", 2f64.powf(-x)),
            x => format!("{}", 2f64.powf(*x)),
        };
        let pair = |of: &dyn Fn(&Variant) -> Vec<u64>| (base.map(of), of(variant));
        steps(&upper, (low, high), "sum of a row's weights", &power, pair(&mass))?;
        let most = (document.settings.n_ctx as f64).ln();
        let nats = |x: &f64| format!("{x}");
        steps(&lower, (0.0, most), "entropy of a row, nats", &nats, pair(&entropy))
    })
}

/// Two histograms in one panel: the baseline's as an outline, the other filled.
fn steps(
    area: &Area,
    (low, high): (f64, f64),
    what: &str,
    label: &dyn Fn(&f64) -> String,
    (base, own): (Option<Vec<u64>>, Vec<u64>),
) -> Result<()> {
    let share = |counts: &[u64]| -> Vec<f64> {
        let total: u64 = counts.iter().sum();
        counts.iter().map(|n| 100.0 * *n as f64 / total.max(1) as f64).collect()
    };
    let (base, own) = (base.map(|b| share(&b)), share(&own));
    let top = own.iter().chain(base.iter().flatten()).fold(1.0f64, |m, x| m.max(*x));
    let outline = |shares: &[f64]| -> Vec<(f64, f64)> {
        let edge = |i: usize| low + (high - low) * i as f64 / N_BINS as f64;
        let sides = |(i, y): (usize, &f64)| [(edge(i), *y), (edge(i + 1), *y)];
        let mut line = vec![(low, 0.0)];
        line.extend(shares.iter().enumerate().flat_map(sides));
        line.push((high, 0.0));
        line
    };
    let mut chart = ChartBuilder::on(area)
        .margin(8)
        .margin_right(18)
        .x_label_area_size(40)
        .y_label_area_size(44)
        .build_cartesian_2d(low..high, 0.0..1.05 * top)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(INK)
        .y_labels(4)
        .label_style(text(INK, HPos::Center, VPos::Center))
        .axis_desc_style(text(INK, HPos::Center, VPos::Center))
        .x_desc(what)
        .y_desc("% of rows")
        .x_label_formatter(&label)
        .y_label_formatter(&|y| format!("{y:.0}"))
        .draw()
        .map_err(failed)?;
    let plot = chart.plotting_area();
    plot.draw(&Polygon::new(outline(&own), FRONT.filled())).map_err(failed)?;
    if let Some(base) = base {
        plot.draw(&PathElement::new(outline(&base), BASE.stroke_width(2))).map_err(failed)?;
    }
    Ok(())
}
