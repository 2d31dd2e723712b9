//! What is found, and how it is told.

use serde_json::json;

use crate::printed::{json, one_line};

/// How it is with something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Fine,
    Problem,
    Unseen,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Self::Fine => "ok",
            Self::Problem => "problem",
            Self::Unseen => "not looked at",
        }
    }
}

#[derive(Debug)]
struct Finding {
    verdict: Verdict,
    /// What it is about, in a word or some.
    about: String,
    found: String,
    /// What to do about a problem.
    advice: Option<String>,
}

/// All that is found, in order.
#[derive(Debug, Default)]
pub(super) struct Findings(Vec<Finding>);

impl Findings {
    /// All is well with it.
    pub(super) fn fine(&mut self, about: impl Into<String>, found: impl Into<String>) {
        self.add(Verdict::Fine, about.into(), found.into(), None);
    }

    /// Something is wrong with it, and `advice` helps.
    pub(super) fn problem(&mut self, about: impl Into<String>, found: impl Into<String>, advice: impl Into<String>) {
        self.add(Verdict::Problem, about.into(), found.into(), Some(advice.into()));
    }

    /// It could not be looked at. `why` says how it could.
    pub(super) fn unseen(&mut self, about: impl Into<String>, why: impl Into<String>) {
        self.add(Verdict::Unseen, about.into(), why.into(), None);
    }

    fn add(&mut self, verdict: Verdict, about: String, found: String, advice: Option<String>) {
        self.0.push(Finding { verdict, about, found, advice });
    }

    /// How many problems there are.
    pub(super) fn problems(&self) -> usize {
        self.0.iter().filter(|finding| finding.verdict == Verdict::Problem).count()
    }

    /// All of it as text, or as JSON.
    pub(super) fn told(&self, as_json: bool) -> String {
        if as_json {
            let one = |finding: &Finding| {
                let Finding { verdict, about, found, advice } = finding;
                json!({ "verdict": verdict.name(), "about": about, "found": found, "advice": advice })
            };
            return json(&self.0.iter().map(one).collect::<Vec<_>>());
        }
        let line = |finding: &Finding| {
            let Finding { verdict, about, found, advice } = finding;
            let said = one_line(&format!("{}: {about}: {found}", verdict.name()));
            advice.as_ref().map_or(said.clone(), |advice| format!("{said}\n    what to do: {}", one_line(advice)))
        };
        self.0.iter().map(line).collect::<Vec<_>>().join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_comes_with_what_to_do() {
        let mut findings = Findings::default();
        findings.fine("alarm", "none");
        findings.problem("queue `a`", "it is\nfull", "empty it");
        findings.unseen("plugins", "nobody tells");
        assert_eq!(findings.problems(), 1);
        let told = "ok: alarm: none\nproblem: queue `a`: it is full\n    what to do: empty it\nnot looked at: plugins: nobody tells";
        assert_eq!(findings.told(false), told);
        let told: serde_json::Value = serde_json::from_str(&findings.told(true)).expect("JSON");
        assert_eq!((&told[1]["verdict"], &told[1]["advice"]), (&json!("problem"), &json!("empty it")));
        assert_eq!((&told[2]["verdict"], &told[2]["advice"]), (&json!("not looked at"), &json!(null)));
    }
}
