//! How the screen of `hopline top` is drawn. Without colours: what stands out is bold, dim or inverted.

use std::time::Instant;

use hopline::Histogram;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style};
use ratatui::symbols::bar::NINE_LEVELS;
use ratatui::text::Line;
use ratatui::widgets::{Row, Table, TableState};

use super::rows::{Column, InstanceRow, Load, MethodRow, ServiceRow};
use super::screen::{OpenService, Screen};
use crate::printed::{bytes, one_line, quantile};

/// How wide the chart of a service is in the list.
const CHART: u16 = 15;

/// Draws the screen as it is now.
pub(super) fn draw(frame: &mut Frame<'_>, screen: &Screen, now: Instant) {
    let [title, said, body, help] =
        Layout::vertical([Constraint::Length(1), Constraint::Length(1), Constraint::Min(0), Constraint::Length(1)])
            .areas(frame.area());
    let services = screen.numbers.services(screen.sort);
    let instances: usize = services.iter().map(|row| row.instances).sum();
    let here = format!(
        "hopline top  {}  {}, {}",
        one_line(&screen.namespace),
        several(services.len(), "service"),
        several(instances, "instance")
    );
    frame.render_widget(Line::styled(here, Modifier::BOLD), title);
    frame.render_widget(Line::styled(notice(screen, services.len(), now), Modifier::BOLD), said);
    match &screen.open {
        Some(open) => draw_service(frame, body, screen, open),
        None => draw_services(frame, body, screen, &services),
    }
    let keys = match &screen.open {
        Some(_) => "↑↓ move   s sort   Esc back   q quit",
        None => "↑↓ move   s sort   Enter open   q quit",
    };
    frame.render_widget(Line::styled(keys, Modifier::DIM), help);
}

/// What stands above the rows.
fn notice(screen: &Screen, services: usize, now: Instant) -> String {
    match (&screen.trouble, screen.numbers.at) {
        (Some(trouble), _) => {
            let seconds = now.saturating_duration_since(trouble.since).as_secs();
            format!("for {seconds}s: {}", one_line(&trouble.why))
        }
        (None, None) => "asking ...".to_owned(),
        (None, Some(_)) if services == 0 => "no instance replies".to_owned(),
        (None, Some(_)) => String::new(),
    }
}

fn draw_services(frame: &mut Frame<'_>, area: Rect, screen: &Screen, services: &[ServiceRow]) {
    let head = ["SERVICE", "INST", "RUNNING", "CALLS/S", "ERRORS/S", "P50", "P99", "LAST MINUTE"];
    let rows = services.iter().map(|row| {
        let [running, calls, errors, p50, p99] = numbers(&row.load);
        let chart = chart(&screen.numbers.minute(&row.service, CHART.into()));
        [one_line(&row.service), row.instances.to_string(), running, calls, errors, p50, p99, chart]
    });
    let chosen = (!services.is_empty()).then(|| screen.chosen_row());
    draw_table(frame, area, screen.sort, head, rows.collect(), [0, 4, 8, 8, 9, 7, 7, CHART], chosen);
}

fn draw_service(frame: &mut Frame<'_>, area: Rect, screen: &Screen, open: &OpenService) {
    let (methods, instances) =
        (screen.numbers.methods(&open.service, screen.sort), screen.numbers.instances(&open.service, screen.sort));
    // Half of the rest belongs to the instances, unless they need less.
    let rest = area.height.saturating_sub(3);
    let needed = u16::try_from(instances.len() + 1).unwrap_or(u16::MAX);
    let below = needed.min((rest / 2).max(rest.saturating_sub(u16::try_from(methods.len() + 1).unwrap_or(u16::MAX))));
    let [name, of_methods, _, of_instances] = Layout::vertical([
        Constraint::Length(2),
        Constraint::Max(u16::try_from(methods.len() + 1).unwrap_or(u16::MAX).min(rest - below.min(rest))),
        Constraint::Length(1),
        Constraint::Length(below),
    ])
    .areas(area);
    let minute = chart(&screen.numbers.minute(&open.service, 60));
    frame.render_widget(Line::from(format!("{:<18} {minute}", one_line(&open.service))), name);
    let chosen = Some(open.row).filter(|row| *row < methods.len());
    let head = ["METHOD", "RUNNING", "CALLS/S", "ERRORS/S", "P50", "P99"];
    let rows = methods.iter().map(|MethodRow { method, load }| {
        let [running, calls, errors, p50, p99] = numbers(load);
        [one_line(method), running, calls, errors, p50, p99]
    });
    draw_table(frame, of_methods, screen.sort, head, rows.collect(), [0, 8, 8, 9, 7, 7], chosen);
    let chosen = open.row.checked_sub(methods.len());
    let head = ["INSTANCE", "HOST", "RUNNING", "CALLS/S", "ERRORS/S", "CPU", "MEMORY", "STATE"];
    let rows = instances.iter().map(|row| {
        let InstanceRow { instance, info, load, cpu, memory } = row;
        let [running, calls, errors, ..] = numbers(load);
        let host = info.as_ref().map_or_else(|| "-".to_owned(), |info| one_line(&info.host));
        let cpu = cpu.map_or_else(|| "-".to_owned(), |cpu| format!("{:.0}%", cpu * 100.0));
        let memory = memory.map_or_else(|| "-".to_owned(), bytes);
        let state = if info.as_ref().is_some_and(|info| info.draining) { "draining" } else { "up" };
        [one_line(instance), host, running, calls, errors, cpu, memory, state.to_owned()]
    });
    draw_table(frame, of_instances, screen.sort, head, rows.collect(), [0, 0, 8, 8, 9, 5, 9, 8], chosen);
}

/// Draws a table. Columns without a width share what is left. ▼ marks what it is sorted by.
fn draw_table<const N: usize>(
    frame: &mut Frame<'_>,
    area: Rect,
    sort: Column,
    head: [&str; N],
    rows: Vec<[String; N]>,
    widths: [u16; N],
    chosen: Option<usize>,
) {
    let sorted = match sort {
        Column::Name => head[0],
        Column::Calls => "CALLS/S",
        Column::Errors => "ERRORS/S",
        Column::Running => "RUNNING",
        Column::P99 => "P99",
    };
    let titles = head.map(|title| if title == sorted { format!("{title}▼") } else { title.to_owned() });
    let widths = widths.map(|width| if width == 0 { Constraint::Fill(1) } else { Constraint::Length(width) });
    let table = Table::new(rows.into_iter().map(Row::new), widths)
        .header(Row::new(titles).style(Modifier::DIM))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    frame.render_stateful_widget(table, area, &mut TableState::new().with_selected(chosen));
}

/// What is running, calls and errors per second, and how long half and 99 % of the calls took at most.
fn numbers(load: &Load) -> [String; 5] {
    let time = |times: &Histogram, share| quantile(times, share);
    let (p50, p99) = (time(&load.times, 0.5), time(&load.times, 0.99));
    [load.running.to_string(), per_second(load.calls_per_s), per_second(load.errors_per_s), p50, p99]
}

fn per_second(rate: Option<f64>) -> String {
    match rate {
        None => "-".to_owned(),
        Some(rate) if rate > 0.0 && rate < 10.0 => format!("{rate:.1}"),
        Some(rate) => format!("{rate:.0}"),
    }
}

/// Numbers as bars. The greatest has the highest.
fn chart(points: &[Option<f64>]) -> String {
    let set = &NINE_LEVELS;
    let levels = [
        set.one_eighth,
        set.one_quarter,
        set.three_eighths,
        set.half,
        set.five_eighths,
        set.three_quarters,
        set.seven_eighths,
        set.full,
    ];
    let greatest = points.iter().flatten().fold(0.0_f64, |greatest, point| greatest.max(*point));
    let bar = |point: &Option<f64>| match point {
        None => " ",
        Some(point) if *point > 0.0 => levels[((point / greatest * 8.0).ceil() as usize).clamp(1, 8) - 1],
        Some(_) => set.one_eighth,
    };
    points.iter().map(bar).collect()
}

fn several(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use hopline::Instance;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use ratatui::crossterm::event::{KeyCode, KeyEvent};

    use super::*;
    use crate::top::rows::tests::stats;

    /// What a terminal of this size shows, line by line.
    fn shown(screen: &Screen, width: u16, height: u16, now: Instant) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("it is in memory");
        terminal.draw(|frame| draw(frame, screen, now)).expect("it is in memory");
        let cells = terminal.backend().buffer().content();
        let line = |cells: &[ratatui::buffer::Cell]| cells.iter().map(|cell| cell.symbol()).collect::<String>();
        cells.chunks(width.into()).map(|cells| line(cells).trim_end().to_owned()).collect()
    }

    fn screen(began: Instant) -> Screen {
        let mut screen = Screen::new("hopline".to_owned());
        for second in 0..3 {
            let calls = second * 100;
            let all = vec![stats("demo.v1", "a1", calls, second), stats("mail.v2", "b2", 0, 0)];
            screen.numbers.count(all, began + Duration::from_secs(second));
        }
        screen
    }

    #[test]
    fn the_services_are_shown_on_80_by_24() {
        let began = Instant::now();
        let lines = shown(&screen(began), 80, 24, began);
        assert_eq!(lines[0], "hopline top  hopline  2 services, 2 instances");
        let [head, demo, mail] = [&lines[2], &lines[3], &lines[4]];
        let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(words(head)[..5], ["SERVICE", "INST", "RUNNING", "CALLS/S▼", "ERRORS/S"], "{lines:#?}");
        assert_eq!(words(demo)[..7], ["demo.v1", "1", "1", "100", "1.0", "≤1ms", "≤1ms"], "{lines:#?}");
        assert!(demo.ends_with('█') && mail.ends_with('▁') && mail.starts_with("mail.v2"), "{lines:#?}");
        assert_eq!(lines[23], "↑↓ move   s sort   Enter open   q quit");
    }

    #[test]
    fn an_open_service_shows_its_methods_and_instances() {
        let began = Instant::now();
        let mut screen = screen(began);
        let mut info = Instance::default();
        (info.service, info.instance) = ("demo.v1".to_owned(), "a1".to_owned());
        (info.host, info.draining) = ("web-1".to_owned(), true);
        screen.numbers.know(vec![info]);
        screen.press(KeyEvent::from(KeyCode::Enter));
        let lines = shown(&screen, 80, 24, began);
        let line = |first: &str| lines.iter().find(|line| line.starts_with(first)).expect("it is shown");
        assert!(line("demo.v1").ends_with('█'), "{lines:#?}");
        assert!(line("add").contains("100"), "{lines:#?}");
        let cells: Vec<_> = line("a1").split_whitespace().collect();
        assert_eq!(cells, ["a1", "web-1", "1", "100", "1.0", "10%", "5", "MiB", "draining"]);
        assert_eq!(lines[23], "↑↓ move   s sort   Esc back   q quit");
    }

    #[test]
    fn what_is_wrong_is_shown_and_the_rows_stay() {
        let began = Instant::now();
        let mut screen = screen(began);
        screen.fails("the broker is away".to_owned(), began);
        let lines = shown(&screen, 80, 24, began + Duration::from_secs(7));
        assert_eq!(lines[1], "for 7s: the broker is away");
        assert!(lines[3].starts_with("demo.v1"));
        let empty = shown(&Screen::new("hopline".to_owned()), 80, 24, began);
        assert_eq!(empty[1], "asking ...");
    }

    #[test]
    fn what_a_peer_says_does_not_steer_the_terminal() {
        let began = Instant::now();
        let mut screen = Screen::new("hopline".to_owned());
        screen.numbers.count(vec![stats("a\u{1b}[2J\u{202e}b", "1\n2", 0, 0)], began);
        assert!(shown(&screen, 80, 24, began)[3].starts_with("a [2J b"));
        screen.press(KeyEvent::from(KeyCode::Enter));
        assert!(shown(&screen, 80, 24, began).iter().any(|line| line.starts_with("1 2")));
    }

    #[test]
    fn a_tiny_terminal_and_many_rows_are_no_panic() {
        let began = Instant::now();
        let mut screen = screen(began);
        let many = (0..500).map(|number| stats("demo.v1", &format!("{number:03}"), 0, 0)).collect();
        screen.numbers.count(many, began + Duration::from_secs(3));
        for open in [false, true] {
            if open {
                screen.press(KeyEvent::from(KeyCode::Enter));
                for _ in 0..600 {
                    screen.press(KeyEvent::from(KeyCode::Down));
                }
                let lines = shown(&screen, 80, 24, began);
                assert!(lines.iter().any(|line| line.starts_with("499")), "the chosen row is in sight: {lines:#?}");
            }
            for (width, height) in [(1, 1), (3, 2), (10, 5), (200, 3), (300, 100)] {
                shown(&screen, width, height, began);
            }
        }
    }

    #[test]
    fn a_chart_has_its_highest_bar_where_most_is() {
        assert_eq!(chart(&[None, Some(0.0), Some(0.1), Some(4.0), Some(8.0)]), " ▁▁▄█");
        assert_eq!(chart(&[Some(0.0)]), "▁");
    }
}
