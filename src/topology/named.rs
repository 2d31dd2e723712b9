//! Names on the broker, read back: what a queue is for, and what a service has. Tools that look at a broker ask this.

use super::{CallsQueue, Declaration, Namespace, QueueKind, ServiceId};

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum QueueRole {
    /// The requests of a service.
    Calls,
    /// The oneway calls of a service.
    Work,
    /// Oneway calls that wait for their next attempt.
    Retry,
    /// The dead letters of a service.
    Dead,
    /// The catalogue of services that have dead letters.
    Catalogue,
    /// The changes of rules.
    Rules,
    /// The events of a pattern, for those who read them later.
    Kept,
    /// The turn of the instances of a group that reads a stream.
    Turn,
    /// How far a group has read its stream.
    Offset,
    /// What is for one instance, subscription or client alone.
    Own,
}

impl Namespace {
    /// What the queue of this name is for, and of which service it is, if it is Hopline's.
    #[must_use]
    pub fn role(&self, queue: &str) -> Option<(QueueRole, Option<ServiceId>)> {
        if queue == self.catalogue_queue() {
            return Some((QueueRole::Catalogue, None));
        }
        if queue == self.rules() {
            return Some((QueueRole::Rules, None));
        }
        let name = queue.strip_prefix(&self.0)?.strip_prefix('.')?;
        if name.starts_with("kept:") {
            return Some((QueueRole::Kept, None));
        }
        if let Some((owner, _)) = name.split_once('@') {
            return Some((QueueRole::Own, ServiceId::parse(owner).ok()));
        }
        let (service, role) = name.rsplit_once('.')?;
        let role = match role {
            "calls" => QueueRole::Calls,
            "work" => QueueRole::Work,
            "retry" => QueueRole::Retry,
            "dead" => QueueRole::Dead,
            "turn" => QueueRole::Turn,
            "offset" => QueueRole::Offset,
            _ => return None,
        };
        // A service is always written with its version there.
        let id = ServiceId::parse(service).ok().filter(|id| id.to_string() == service)?;
        Some((role, Some(id)))
    }

    /// The service and the id of the instance whose own queue has this name.
    pub(crate) fn owner<'a>(&self, queue: &'a str) -> Option<(ServiceId, &'a str)> {
        let name = queue.strip_prefix(&self.0)?.strip_prefix('.')?;
        let (service, owner) = name.split_once('@')?;
        let (instance, _) = owner.split_once('.')?;
        // Clients and subscribers have such queues, too, but no version.
        let id = ServiceId::parse(service).ok().filter(|id| id.to_string() == service)?;
        Some((id, instance))
    }

    /// The queues of a service or a group that stay, as they are declared if it has no options and no methods.
    #[must_use]
    pub fn queues_of(&self, service: &ServiceId) -> Vec<(QueueRole, Declaration)> {
        let calls = CallsQueue {
            kind: QueueKind::Classic,
            grace: std::time::Duration::from_secs(60),
            max_length: None,
            priorities: false,
        };
        let first = |parts: Vec<Declaration>| parts.into_iter().next();
        let parts = [
            (QueueRole::Calls, first(self.calls(service, calls))),
            (QueueRole::Work, first(self.work(service, &[]))),
            (QueueRole::Retry, Some(self.retry(service))),
            (QueueRole::Dead, Some(self.dead(service))),
        ];
        let has = |role| role != QueueRole::Calls || !service.is_group();
        parts.into_iter().filter(|(role, _)| has(*role)).filter_map(|(role, part)| Some((role, part?))).collect()
    }

    /// An exclusive queue such as an instance of `service` has, and a binding as it needs: to try whether that may be
    /// declared. The binding's key reaches nobody else.
    #[must_use]
    pub fn tried_as_server(&self, service: &ServiceId, suffix: &str) -> Vec<Declaration> {
        self.tried(self.instance_queue(service, "doctor", suffix), self.rpc())
    }

    /// The same of a client. The binding is what watching the instances needs.
    #[must_use]
    pub fn tried_as_client(&self, suffix: &str) -> Vec<Declaration> {
        self.tried(self.reply_queue("doctor", suffix), self.discovery())
    }

    /// The same of a client that watches the instances. The binding has the broker tell which queues are deleted.
    #[must_use]
    pub fn tried_as_watch(&self, suffix: &str) -> Vec<Declaration> {
        let queue = self.reply_queue("doctor", &format!("{suffix}-watch"));
        let bound = Declaration::Binding(super::deletion::told_to(&queue));
        vec![Declaration::Queue(super::Queue::new(queue, QueueKind::Exclusive)), bound]
    }

    fn tried(&self, queue: String, exchange: String) -> Vec<Declaration> {
        let bound = super::binding(exchange, queue.clone(), &queue);
        vec![Declaration::Queue(super::Queue::new(queue, QueueKind::Exclusive)), bound]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_of_queues_tell_what_they_are_for() {
        let namespace = Namespace::default();
        let demo: ServiceId = "demo.v2".parse().expect("a good name");
        for (role, part) in namespace.queues_of(&demo) {
            let Declaration::Queue(queue) = part else { panic!("{part:?} is no queue") };
            assert_eq!(namespace.role(&queue.name), Some((role, Some(demo.clone()))));
        }
        let own = namespace.instance_queue(&demo, "i", "s");
        assert_eq!(namespace.owner(&own), Some((demo.clone(), "i")));
        for other in ["hopline.demo.v2.calls", "hopline.reply@i.s", "hopline.events@i.s", "other.demo.v2@i.s"] {
            assert_eq!(namespace.owner(other), None, "{other}");
        }
        assert_eq!(namespace.role("hopline.services"), Some((QueueRole::Catalogue, None)));
        let group = ServiceId::group("billing").expect("a good name");
        let work = namespace.work_queue(&group);
        assert_eq!(namespace.role(&work), Some((QueueRole::Work, Some(group.clone()))));
        for (name, role) in
            [(namespace.turn_queue(&group), QueueRole::Turn), (namespace.offset_queue(&group), QueueRole::Offset)]
        {
            assert_eq!(namespace.role(&name), Some((role, Some(group.clone()))));
        }
        assert_eq!(namespace.role(&namespace.kept_stream("order.*")), Some((QueueRole::Kept, None)));
        let own = namespace.instance_queue(&group, "i", "s");
        assert_eq!(namespace.owner(&own), Some((group, "i")));
        assert_eq!(namespace.role("hopline.demo.v2@i.s"), Some((QueueRole::Own, Some(demo))));
        assert_eq!(namespace.role("hopline.rules"), Some((QueueRole::Rules, None)));
        assert_eq!(namespace.role("hopline.reply@i.s").map(|(role, _)| role), Some(QueueRole::Own));
        for foreign in ["hopline.demo.calls", "hopline.demo.v2.more", "other.demo.v2.calls", "hopline", "mail"] {
            assert_eq!(namespace.role(foreign), None, "{foreign}");
        }
    }
}
