//! `hopline top`: the services on a screen that goes on.

mod drawn;
mod rows;
mod screen;

use std::io::{self, IsTerminal as _};
use std::pin::pin;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use hopline::{Error, Instance, InstanceStats, Registry};
use ratatui::crossterm::event::{self, Event, KeyEventKind};
use tokio::sync::mpsc;

use self::screen::{Pressed, Screen};
use crate::asking::Questions;
use crate::failed::Failed;
use crate::signals;

/// The pause between two rounds of questions.
const PAUSE: Duration = Duration::from_secs(1);

/// Show the services on a screen, and how busy they are, until `q` is pressed.
///
/// All instances are asked about every second. CALLS/S, ERRORS/S, P50 and P99 are of the calls that have ended since the
/// replies before. ERRORS/S are methods' own errors and faults. P50 and P99 say how long handlers ran at most, in half
/// and in 99 % of the calls. The chart has the calls per second of the last minute. While there is no connection, the
/// screen says so and keeps the last numbers; it goes on by itself.
///
/// Keys: up and down, or k and j, choose a row. s sorts by another column. Enter opens a service: its methods and its
/// instances. Esc or Backspace goes back. q or Ctrl-C leaves, with 0. Exits with 1 and an error on stderr when it cannot
/// connect at first, and with 2 on wrong usage, or where there is no terminal.
#[derive(Args)]
#[command(after_help = "Example:\n  hopline top --url amqp://broker.example.com")]
pub(crate) struct Top {
    #[command(flatten)]
    questions: Questions,
}

/// What the instances have said.
struct Round {
    stats: Result<Vec<InstanceStats>, Error>,
    infos: Vec<Instance>,
}

impl Top {
    pub(crate) async fn run(self) -> Result<(), Failed> {
        if !(io::stdout().is_terminal() && io::stdin().is_terminal()) {
            return Err(Failed::usage(
                "`hopline top` needs a terminal: elsewhere use `hopline stats SERVICE --watch` or `hopline ls --json`"
                    .to_owned(),
            ));
        }
        let screen = Screen::new(self.questions.namespace.namespace.clone());
        self.questions.ask(async |registry| show(screen, registry).await).await
    }
}

/// Shows the screen until the user leaves it, or the process is told to end.
async fn show(mut screen: Screen, registry: Registry) -> Result<(), Failed> {
    let mut signal = pin!(signals::told_to_end().map_err(|error| Failed::at("cannot hear of signals", error))?);
    let mut terminal = ratatui::try_init().map_err(|error| Failed::at("the terminal cannot be used", error))?;
    // A panic restores it, too: `try_init` sees to that.
    let _restored = Restored;
    let mut events = events();
    let mut round = pin!(ask(&registry, None, Duration::ZERO));
    loop {
        terminal
            .draw(|frame| drawn::draw(frame, &screen, Instant::now()))
            .map_err(|error| Failed::at("the terminal cannot be used", error))?;
        tokio::select! {
            biased;
            () = &mut signal => return Ok(()),
            event = events.recv() => match event {
                Some(Event::Key(key)) if key.kind != KeyEventKind::Release => match screen.press(key) {
                    Pressed::Leave => return Ok(()),
                    Pressed::Opened => {
                        let open = screen.open.as_ref().map(|open| open.service.clone());
                        round.set(ask(&registry, open, Duration::ZERO));
                    }
                    Pressed::Drawn => {}
                },
                Some(_) => {}
                None => return Err(Failed::run("no keys can be read from the terminal any more".to_owned())),
            },
            said = &mut round => {
                take(&mut screen, said, Instant::now());
                round.set(ask(&registry, screen.open.as_ref().map(|open| open.service.clone()), PAUSE));
            }
            // How long there has been no connection.
            () = second(), if screen.trouble.is_some() => {}
        }
    }
}

async fn second() {
    tokio::time::sleep(Duration::from_secs(1)).await;
}

/// Asks all instances what they have counted, and those of the open service what they say of themselves.
async fn ask(registry: &Registry, open: Option<String>, pause: Duration) -> Round {
    tokio::time::sleep(pause).await;
    let infos = async {
        match &open {
            // It is asked again; that it is there, the numbers tell.
            Some(service) => registry.instances(service).await.unwrap_or_default(),
            None => Vec::new(),
        }
    };
    let (stats, infos) = tokio::join!(registry.all_stats(), infos);
    Round { stats, infos }
}

fn take(screen: &mut Screen, Round { stats, infos }: Round, now: Instant) {
    match stats {
        Ok(stats) => {
            screen.numbers.count(stats, now);
            screen.trouble = None;
        }
        Err(Error::Disconnected { reason, .. }) => screen.fails(format!("no connection: {reason}"), now),
        Err(error) => screen.fails(Failed::from(error).to_string(), now),
    }
    screen.numbers.know(infos);
}

/// What happens at the terminal, read on a thread that ends with the process.
fn events() -> mpsc::UnboundedReceiver<Event> {
    let (sender, events) = mpsc::unbounded_channel();
    thread::spawn(move || {
        while let Ok(event) = event::read() {
            if sender.send(event).is_err() {
                return;
            }
        }
    });
    events
}

/// Gives the terminal back as it was.
struct Restored;

impl Drop for Restored {
    fn drop(&mut self) {
        ratatui::restore();
    }
}
