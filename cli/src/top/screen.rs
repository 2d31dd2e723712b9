//! What the screen of `hopline top` shows: the numbers, what the user has chosen of them, and what is wrong.

use std::time::Instant;

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::rows::{Column, Numbers};

/// What is shown, and how.
pub(super) struct Screen {
    pub(super) namespace: String,
    pub(super) numbers: Numbers,
    pub(super) sort: Column,
    /// The chosen service, by its name: it stays chosen when the order changes.
    chosen: Option<String>,
    pub(super) open: Option<OpenService>,
    pub(super) trouble: Option<Trouble>,
}

/// A service whose methods and instances are shown.
pub(super) struct OpenService {
    pub(super) service: String,
    /// The chosen row: the methods are counted first, and then the instances.
    pub(super) row: usize,
}

/// Why nobody can be asked.
pub(super) struct Trouble {
    pub(super) why: String,
    pub(super) since: Instant,
}

/// What comes of a key.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pressed {
    /// The screen has changed.
    Drawn,
    /// Another service is open: its instances have not said yet who they are.
    Opened,
    Leave,
}

impl Screen {
    pub(super) fn new(namespace: String) -> Self {
        let (numbers, sort) = (Numbers::default(), Column::default());
        Self { namespace, numbers, sort, chosen: None, open: None, trouble: None }
    }

    /// Asking has failed.
    pub(super) fn fails(&mut self, why: String, now: Instant) {
        let since = self.trouble.as_ref().map_or(now, |trouble| trouble.since);
        self.trouble = Some(Trouble { why, since });
    }

    pub(super) fn press(&mut self, key: KeyEvent) -> Pressed {
        match key.code {
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Pressed::Leave,
            KeyCode::Char('q') => return Pressed::Leave,
            KeyCode::Down | KeyCode::Char('j') => self.choose(|row| row + 1),
            KeyCode::Up | KeyCode::Char('k') => self.choose(|row| row.saturating_sub(1)),
            KeyCode::Char('s') => self.sort = self.sort.next(),
            KeyCode::Esc | KeyCode::Backspace => self.open = None,
            KeyCode::Enter if self.open.is_none() => {
                let Some(service) = self.chosen_service() else { return Pressed::Drawn };
                (self.chosen, self.open) = (Some(service.clone()), Some(OpenService { service, row: 0 }));
                return Pressed::Opened;
            }
            _ => {}
        }
        Pressed::Drawn
    }

    /// The place of the chosen service among all. The first if none is chosen, or the chosen one has gone.
    pub(super) fn chosen_row(&self) -> usize {
        let services = self.numbers.services(self.sort);
        services.iter().position(|row| Some(&row.service) == self.chosen.as_ref()).unwrap_or(0)
    }

    fn chosen_service(&self) -> Option<String> {
        self.numbers.services(self.sort).into_iter().nth(self.chosen_row()).map(|row| row.service)
    }

    fn choose(&mut self, other: impl Fn(usize) -> usize) {
        let row = self.chosen_row();
        match &mut self.open {
            Some(open) => {
                let methods = self.numbers.methods(&open.service, self.sort).len();
                let rows = methods + self.numbers.instances(&open.service, self.sort).len();
                open.row = other(open.row).min(rows.saturating_sub(1));
            }
            None => {
                let services = self.numbers.services(self.sort);
                let row = other(row).min(services.len().saturating_sub(1));
                self.chosen = services.into_iter().nth(row).map(|row| row.service);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::top::rows::tests::stats;

    fn screen() -> Screen {
        let mut screen = Screen::new("hopline".to_owned());
        let now = Instant::now();
        screen.numbers.count(vec![stats("a.v1", "1", 0, 0), stats("b.v1", "1", 0, 0)], now);
        let later = now + Duration::from_secs(1);
        screen.numbers.count(vec![stats("a.v1", "1", 1, 1), stats("b.v1", "1", 5, 0)], later);
        screen
    }

    fn press(screen: &mut Screen, codes: &[KeyCode]) {
        for code in codes {
            screen.press(KeyEvent::from(*code));
        }
    }

    #[test]
    fn what_is_chosen_stays_so_when_the_order_changes() {
        let mut screen = screen();
        press(&mut screen, &[KeyCode::Down, KeyCode::Char('j'), KeyCode::Up, KeyCode::Down]);
        assert_eq!((screen.chosen_row(), screen.chosen_service().as_deref()), (1, Some("a.v1")));
        press(&mut screen, &[KeyCode::Char('s')]);
        assert_eq!((screen.chosen_row(), screen.chosen_service().as_deref()), (0, Some("a.v1")));
        press(&mut screen, &[KeyCode::Char('k')]);
        assert_eq!(screen.chosen_row(), 0);
    }

    #[test]
    fn a_service_is_opened_and_left() {
        let mut screen = screen();
        assert_eq!(screen.press(KeyEvent::from(KeyCode::Enter)), Pressed::Opened);
        press(&mut screen, &[KeyCode::Down, KeyCode::Down]);
        let open = screen.open.as_ref().map(|open| (open.service.as_str(), open.row));
        assert_eq!(open, Some(("b.v1", 1)), "a method and an instance");
        press(&mut screen, &[KeyCode::Esc]);
        assert!(screen.open.is_none());
        press(&mut screen, &[KeyCode::Enter, KeyCode::Backspace]);
        assert!(screen.open.is_none());
        assert_eq!(Screen::new(String::new()).press(KeyEvent::from(KeyCode::Enter)), Pressed::Drawn, "there is none");
    }

    #[test]
    fn q_and_ctrl_c_leave() {
        let mut screen = screen();
        assert_eq!(screen.press(KeyEvent::from(KeyCode::Char('q'))), Pressed::Leave);
        assert_eq!(screen.press(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)), Pressed::Leave);
        assert_eq!(screen.press(KeyEvent::from(KeyCode::Char('c'))), Pressed::Drawn);
    }

    #[test]
    fn trouble_lasts_since_its_beginning() {
        let (mut screen, now) = (screen(), Instant::now());
        screen.fails("one".to_owned(), now);
        screen.fails("two".to_owned(), now + Duration::from_secs(5));
        let trouble = screen.trouble.expect("there is some");
        assert_eq!((trouble.why.as_str(), trouble.since), ("two", now));
    }
}
