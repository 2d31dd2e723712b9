//! The chart of a sweep: calls/s over calls in flight, a line for each size and way to coalesce.

use plotters::prelude::*;

use super::load::Coalesce;
use super::{Point, bytes};

/// Width and height, in pixels.
const CANVAS: (u32, u32) = (960, 600);
/// Family and size of all but the caption.
const TEXT: (&str, u32) = ("sans-serif", 17);
/// One for each size, which are told apart by those who see fewer colours, too.
const COLOURS: [RGBColor; 3] = [RGBColor(0, 114, 178), RGBColor(213, 94, 0), RGBColor(0, 158, 115)];

/// The chart of `points` as an SVG file. `concurrency` is how many calls are in flight in them, in order, and `sizes` is
/// what each sends.
///
/// # Errors
/// When it cannot be drawn.
pub(super) fn svg(points: &[Point], concurrency: &[u32], sizes: &[u32]) -> Result<String, String> {
    let mut text = String::new();
    draw(&mut text, points, concurrency, sizes).map_err(|error| format!("cannot draw the chart: {error}"))?;
    Ok(text)
}

fn draw(
    text: &mut String,
    points: &[Point],
    concurrency: &[u32],
    sizes: &[u32],
) -> Result<(), Box<dyn std::error::Error>> {
    let most = points.iter().map(|point| point.figures.calls_per_s).fold(1.0, f64::max);
    let fewest = concurrency.first().copied().map_or(1.0, f64::from);
    let widest = concurrency.last().copied().map_or(1.0, f64::from);
    let canvas = SVGBackend::with_string(text, CANVAS).into_drawing_area();
    canvas.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&canvas)
        .caption("Calls per second by calls in flight", ("sans-serif", 26))
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(80)
        .build_cartesian_2d((fewest..widest).log_scale().base(2.0), 0.0..most * 1.05)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("calls in flight")
        .y_desc("calls/s")
        .x_labels(11)
        .x_label_formatter(&|calls| format!("{calls:.0}"))
        .y_label_formatter(&|calls| format!("{calls:.0}"))
        .label_style(TEXT)
        .axis_desc_style(TEXT)
        .draw()?;

    for (size, colour) in sizes.iter().copied().zip(COLOURS) {
        for coalesce in Coalesce::BOTH {
            let style = match coalesce {
                Coalesce::Auto => colour.stroke_width(3),
                Coalesce::Off => colour.mix(0.55).stroke_width(1),
            };
            let of_this = points.iter().filter(|point| point.load.size == size && point.load.coalesce == coalesce);
            let line = of_this.map(|point| (f64::from(point.load.concurrency), point.figures.calls_per_s));
            chart
                .draw_series(LineSeries::new(line, style).point_size(3))?
                .label(format!("{}, coalesce {}", bytes(size), coalesce.name()))
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 24, y)], style));
        }
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .label_font(TEXT)
        .legend_area_size(32)
        .margin(12)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    canvas.present()?;
    Ok(())
}
