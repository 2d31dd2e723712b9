//! What a policy of the broker does to a queue or an exchange of Hopline: the table in the guide's page Troubleshooting.

use hopline::topology::QueueRole;
use serde_json::{Map, Value};

/// The definition of a policy, or of several together.
pub(super) type Definition = Map<String, Value>;

/// What becomes of a group whose offset is lost.
const FORGETS: &str = "the group forgets how far it has come, and begins its replay anew";

/// The parts of a policy that harm a queue: each with what it does.
pub(super) fn harm(role: QueueRole, definition: &Definition) -> Vec<(String, &'static str)> {
    let overflow = definition.get("overflow").and_then(Value::as_str);
    let mut harm = Vec::new();
    for (part, value) in definition {
        let does = match part.as_str() {
            "max-length" | "max-length-bytes" => limit(role, overflow),
            "overflow" if overflow == Some("drop-head") => dropping(role),
            "message-ttl" => ttl(role),
            "expires" => expiry(role),
            "delivery-limit"
                if role == QueueRole::Work && value.as_i64().is_some_and(|limit| (0..19).contains(&limit)) =>
            {
                Some("calls whose instances are lost become dead letters sooner")
            }
            _ => None,
        };
        if let Some(does) = does {
            harm.push((format!("{part} = {value}"), does));
        }
    }
    harm
}

fn limit(role: QueueRole, overflow: Option<&str>) -> Option<&'static str> {
    let refuses = overflow == Some("reject-publish");
    match role {
        QueueRole::Calls if refuses => None,
        QueueRole::Calls => {
            Some("calls that have waited longest are dropped, and their callers hear nothing until their deadline")
        }
        // The queue's own argument says that it refuses what is too much.
        QueueRole::Work if overflow == Some("drop-head") => {
            Some("calls that have waited longest become dead letters, unrun")
        }
        QueueRole::Work => None,
        QueueRole::Retry => {
            Some("oneway calls that failed find no room, and their attempts are not counted as they should be")
        }
        QueueRole::Dead if refuses => Some("servers are `Degraded` when it is full, and hold what it refuses"),
        QueueRole::Dead => Some("the oldest dead letters are lost"),
        QueueRole::Own => Some("replies, broadcasts, cancels or events are lost"),
        QueueRole::Catalogue => Some("`hopline dead ls` misses services"),
        QueueRole::Rules => Some("the oldest rules are lost"),
        QueueRole::Kept => Some("the oldest events that are kept are lost"),
        // They hold a message or a few, and no limit is lower than one.
        QueueRole::Turn | QueueRole::Offset => None,
    }
}

fn dropping(role: QueueRole) -> Option<&'static str> {
    matches!(role, QueueRole::Work | QueueRole::Retry)
        .then_some("what leaves the queue is lost when the next queue is not there at that moment")
}

fn ttl(role: QueueRole) -> Option<&'static str> {
    match role {
        QueueRole::Calls => Some("calls that wait longer vanish, and their callers hear nothing until their deadline"),
        QueueRole::Work => Some("oneway calls that wait longer become dead letters, unrun"),
        QueueRole::Retry => Some("failed calls come back sooner than their pause"),
        QueueRole::Dead => Some("dead letters vanish after that time"),
        QueueRole::Catalogue => Some("`hopline dead ls` misses services"),
        QueueRole::Rules => Some("the oldest rules are lost"),
        QueueRole::Offset => Some(FORGETS),
        // A stream has its own age, and the turn is put there again by who needs it.
        QueueRole::Kept | QueueRole::Turn | QueueRole::Own => None,
    }
}

fn expiry(role: QueueRole) -> Option<&'static str> {
    match role {
        QueueRole::Calls => Some("calls wait for a server no longer than that"),
        QueueRole::Work => Some("all oneway calls that wait are lost when no server has run for that time"),
        QueueRole::Retry => Some("failed calls that wait in it are lost with it"),
        QueueRole::Dead => Some("all dead letters are lost when no server has run for that time"),
        QueueRole::Catalogue => Some("`hopline dead ls` misses services"),
        QueueRole::Rules => Some("the oldest rules are lost"),
        QueueRole::Offset => Some(FORGETS),
        // A stream does not expire, and who needs the turn declares it.
        QueueRole::Kept | QueueRole::Turn | QueueRole::Own => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parts(role: QueueRole, definition: Value) -> Vec<String> {
        let definition = definition.as_object().expect("an object").clone();
        harm(role, &definition).into_iter().map(|(part, _)| part).collect()
    }

    #[test]
    fn a_limit_that_refuses_is_safe_where_callers_hear_of_it() {
        let refusing = json!({ "max-length": 10, "overflow": "reject-publish" });
        assert!(parts(QueueRole::Calls, refusing.clone()).is_empty());
        assert!(parts(QueueRole::Work, refusing.clone()).is_empty());
        assert_eq!(parts(QueueRole::Retry, refusing.clone()), ["max-length = 10"]);
        assert_eq!(parts(QueueRole::Dead, refusing), ["max-length = 10"]);
        assert_eq!(parts(QueueRole::Calls, json!({ "max-length": 10 })), ["max-length = 10"]);
        assert!(parts(QueueRole::Work, json!({ "max-length": 10 })).is_empty());
    }

    #[test]
    fn what_drops_or_expires_messages_is_told_and_what_does_nothing_is_not() {
        assert_eq!(
            parts(QueueRole::Work, json!({ "max-length": 10, "overflow": "drop-head" })),
            ["max-length = 10", "overflow = \"drop-head\""]
        );
        for role in [QueueRole::Calls, QueueRole::Work, QueueRole::Retry, QueueRole::Dead, QueueRole::Catalogue] {
            assert_eq!(parts(role, json!({ "message-ttl": 5, "expires": 6 })).len(), 2, "{role:?}");
        }
        assert_eq!(parts(QueueRole::Work, json!({ "delivery-limit": 3 })), ["delivery-limit = 3"]);
        assert!(parts(QueueRole::Work, json!({ "delivery-limit": 50, "dead-letter-exchange": "x" })).is_empty());
        assert!(parts(QueueRole::Own, json!({ "queue-leader-locator": "balanced" })).is_empty());
    }
}
