//! Attempts of one call that are on their way at the same time, each at an instance of its own.

use std::sync::{Arc, Mutex, PoisonError};

/// One of several attempts of a call at the same time, with what it knows of the others.
#[derive(Debug, Clone, Default)]
pub(crate) struct Apart {
    goes: Goes,
    /// The instances at which these attempts are, as far as the client has chosen them.
    taken: Arc<Mutex<Vec<Arc<str>>>>,
    /// What it is beside the first of them.
    beside: Option<Beside>,
}

/// What an attempt is that is made while another one of its call is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Beside {
    Hedge,
    Fork,
}

/// Which instance such an attempt goes to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Goes {
    /// The one to which it would go alone: by its route, or whichever takes it from the queue that all share.
    #[default]
    Anywhere,
    /// One at which none of the others is.
    Elsewhere,
    /// The same, and rather one that has told by its replies how quick it is.
    ElsewhereQuickly,
}

impl Apart {
    /// Another attempt, at another instance.
    pub(crate) fn elsewhere(&self) -> Self {
        Self { goes: Goes::Elsewhere, ..self.clone() }
    }

    /// The same, of an attempt that is made beside the first.
    pub(crate) fn also_elsewhere(&self) -> Self {
        Self { beside: Some(Beside::Fork), ..self.elsewhere() }
    }

    /// Another attempt, at another instance of which it is known how quick it is, if there is one.
    pub(crate) fn elsewhere_quickly(&self) -> Self {
        Self { goes: Goes::ElsewhereQuickly, beside: Some(Beside::Hedge), ..self.clone() }
    }

    /// What it is beside the first of these attempts. `None` for the first.
    pub(crate) fn beside(&self) -> Option<Beside> {
        self.beside
    }

    /// At how many instances chosen by the client these attempts are or were.
    pub(crate) fn places(&self) -> usize {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether it has to go to an instance that the client chooses.
    pub(crate) fn is_elsewhere(&self) -> bool {
        self.goes != Goes::Anywhere
    }

    /// Whether it is rather to go to an instance of which it is known how quick it is.
    pub(crate) fn is_in_haste(&self) -> bool {
        self.goes == Goes::ElsewhereQuickly
    }

    /// Lets `choose` find an instance, given those at which the others are. These do not choose the same one meanwhile.
    pub(crate) fn choose<C>(
        &self,
        choose: impl FnOnce(&[Arc<str>]) -> Option<C>,
        instance: impl FnOnce(&C) -> Arc<str>,
    ) -> Option<C> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let chosen = choose(&taken)?;
        taken.push(instance(&chosen));
        Some(chosen)
    }
}
