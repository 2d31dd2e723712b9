//! What this user may do on the broker: it is tried on queues of our own, which go with the connection.

use hopline::ServiceId;
use hopline::topology::Declaration;
use hopline::transport::Mode;

use super::finding::Findings;
use super::{Patient, forbids};

/// A permission that is missing, and what does not work without it.
struct Lack {
    permission: &'static str,
    on: String,
    without: &'static str,
}

/// What a client needs.
pub(super) async fn of_a_client(patient: &Patient<'_>, findings: &mut Findings) {
    let about = "permissions of a client";
    let mut lacks = Vec::new();
    let queue = patient.namespace.tried_as_client(&patient.suffix);
    let without = ["no client can connect", "no client hears replies", "`Registry::watch` hears late of changes"];
    tried(patient, about, &queue, without, &mut lacks, findings).await;
    for (exchange, without) in [
        (patient.namespace.rpc(), "nobody can be called"),
        (patient.namespace.oneway(), "no oneway calls can be made"),
        (patient.namespace.events(), "no events can be published"),
        (patient.namespace.discovery(), "nobody can be asked who is there"),
    ] {
        may_publish(patient, about, exchange, without, &mut lacks, findings).await;
    }
    told(patient, about, lacks, findings);
}

/// Whether a watch is told by the broker that an instance is lost. It goes on without, so nothing here is a problem.
pub(super) async fn to_hear_of_deletions(patient: &Patient<'_>, findings: &mut Findings) {
    let about = "events of the broker";
    let [queue, binding] = &patient.namespace.tried_as_watch(&patient.suffix)[..] else { return };
    let late = "`Registry::watch` and routes miss an instance that was killed within 10 s, by asking";
    let declared = async {
        patient.transport.declare(std::slice::from_ref(queue)).await?;
        patient.transport.declare(std::slice::from_ref(binding)).await
    };
    match patient.answered(declared).await {
        Ok(()) => findings.fine(
            about,
            "the plugin `rabbitmq_event_exchange` is there: `Registry::watch` and routes hear at once of an instance that was \
             killed",
        ),
        Err(words) if words.contains("NOT_FOUND") => findings.fine(
            about,
            format!(
                "none in this virtual host: {late}. `rabbitmq-plugins enable rabbitmq_event_exchange` has the broker tell it at \
                 once"
            ),
        ),
        Err(words) if forbids(&words) => findings.unseen(
            about,
            format!("the user `{}` may not read `amq.rabbitmq.event`, if that is there: {late}", patient.user()),
        ),
        Err(words) => findings.unseen(about, words),
    }
}

/// What a server of a service needs.
pub(super) async fn of_a_server(patient: &Patient<'_>, service: &ServiceId, findings: &mut Findings) {
    let about = format!("permissions of a server of `{service}`");
    let mut lacks = Vec::new();
    let queue = patient.namespace.tried_as_server(service, &patient.suffix);
    let without = ["it cannot start", "it gets no calls", "it cannot bind its queues"];
    tried(patient, &about, &queue, without, &mut lacks, findings).await;
    if let Some(reason) = patient.transport.replies_refused().filter(|reason| forbids(reason)) {
        let _ = reason;
        lacks.push(Lack { permission: "write", on: "amq.default".to_owned(), without: "it cannot reply" });
    }
    told(patient, &about, lacks, findings);
}

/// Tries to declare a queue, to consume it and to bind it; `without` says what does not work where that is forbidden.
async fn tried(
    patient: &Patient<'_>,
    about: &str,
    parts: &[Declaration],
    without: [&'static str; 3],
    lacks: &mut Vec<Lack>,
    findings: &mut Findings,
) {
    let [queue @ Declaration::Queue(named), binding @ Declaration::Binding(bound)] = parts else { return };
    // What comes after the sign differs for each connection.
    let name = named.name.split_inclusive('@').next().unwrap_or_default().to_owned();
    let declared = patient.answered(patient.transport.declare(std::slice::from_ref(queue))).await;
    if let Err(words) = declared {
        match forbids(&words) {
            true => lacks.push(Lack { permission: "configure", on: name, without: without[0] }),
            false => findings.unseen(about, words),
        }
        return;
    }
    match patient.answered(patient.transport.consume(&named.name, Mode::NoAck)).await {
        Ok(_) => {}
        Err(words) if forbids(&words) => lacks.push(Lack { permission: "read", on: name.clone(), without: without[1] }),
        Err(words) => findings.unseen(about, words),
    }
    match patient.answered(patient.transport.declare(std::slice::from_ref(binding))).await {
        Ok(()) => {}
        // The broker names the queue if it may not be written to, and the exchange if it may not be read from.
        Err(words) if forbids(&words) && words.contains(&format!("exchange '{}'", bound.exchange)) => {
            lacks.push(Lack { permission: "read", on: bound.exchange.clone(), without: without[2] });
        }
        Err(words) if forbids(&words) => lacks.push(Lack { permission: "write", on: name, without: without[2] }),
        // An exchange that is not there is told of elsewhere.
        Err(words) if words.contains("NOT_FOUND") => {}
        Err(words) => findings.unseen(about, words),
    }
}

async fn may_publish(
    patient: &Patient<'_>,
    about: &str,
    exchange: String,
    without: &'static str,
    lacks: &mut Vec<Lack>,
    findings: &mut Findings,
) {
    if !patient.is_open() {
        return findings.unseen(
            format!("{about}: to write to `{exchange}`"),
            "the broker accepts no messages: look again after the alarm",
        );
    }
    match patient.answered(patient.rabbit.may_publish(&exchange, "doctor")).await {
        Ok(()) => {}
        // A topic permission: other keys may be allowed.
        Err(words) if forbids(&words) && words.contains("topic '") => {}
        Err(words) if forbids(&words) => lacks.push(Lack { permission: "write", on: exchange, without }),
        // An exchange that is not there is told of elsewhere.
        Err(words) if words.contains("NOT_FOUND") => {}
        Err(words) => findings.unseen(format!("{about}: to write to `{exchange}`"), words),
    }
}

fn told(patient: &Patient<'_>, about: &str, lacks: Vec<Lack>, findings: &mut Findings) {
    let user = patient.user();
    if lacks.is_empty() {
        findings.fine(about, format!("the user `{user}` may do all that was tried"));
    }
    for Lack { permission, on, without } in lacks {
        findings.problem(
            about,
            format!("the user `{user}` may not {permission} `{on}`: {without}"),
            format!(
                "add `{}` to the pattern of {permission} in `rabbitmqctl set_permissions -p VHOST {user} CONFIGURE WRITE READ`: the \
                 guide's page Security has all three",
                on.replace('.', "\\.")
            ),
        );
    }
}
