//! What AMQP alone tells of a broker: its version, alarms, limits and exchanges.

use hopline::topology::Declaration;
use hopline::transport::rabbit::Comparison;
use hopline::transport::{Confirm, ConnectionEvent, Properties, Publication};

use super::finding::Findings;
use super::{Patient, forbids};
use crate::printed::bytes;

/// The oldest version that is supported.
const OLDEST: (u32, u32) = (3, 10);
/// From this version on, no call is taken back since it runs for long.
const WITHOUT_TIMEOUT: (u32, u32) = (4, 3);
/// What Hopline needs of a broker.
const NEEDED: [&str; 4] = ["publisher_confirms", "basic.nack", "consumer_cancel_notify", "connection.blocked"];
/// A connection that has room for fewer queues is too small for some servers.
const FEW_QUEUES: usize = 64;
/// The largest message of clients and servers that set nothing else, in bytes.
const LARGEST: usize = 16 << 20;

/// The first two numbers of a version.
fn release(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split('.').map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// Version and abilities.
pub(super) fn broker(patient: &Patient<'_>, findings: &mut Findings) {
    let Some(greeting) = patient.rabbit.greeting() else {
        return findings.unseen("broker", "what it says of itself cannot be read");
    };
    let named = format!("{} {}", greeting.product, greeting.version);
    match release(&greeting.version) {
        _ if greeting.product != "RabbitMQ" => findings.problem(
            "broker",
            format!("it is {named}, with which Hopline is not tested"),
            "use RabbitMQ 3.10 or newer",
        ),
        Some(release) if release < OLDEST => {
            findings.problem("broker", format!("{named} is too old"), "install RabbitMQ 3.10 or newer, best 4.3")
        }
        _ => findings.fine("broker", format!("{named}, and this user is `{}` there", patient.user())),
    }
    let missing: Vec<_> =
        NEEDED.into_iter().filter(|needed| !greeting.capabilities.iter().any(|it| it == needed)).collect();
    if !missing.is_empty() {
        findings.problem(
            "broker",
            format!("it cannot do {}", missing.join(", ")),
            "connect to RabbitMQ itself: a proxy that speaks AMQP may be in between",
        );
    }
}

/// Memory and disk.
pub(super) async fn alarm(patient: &Patient<'_>, findings: &mut Findings) {
    answered_or_blocked(patient).await;
    match patient.transport.blocked() {
        None => findings.fine("alarm", "none: the broker accepts messages"),
        Some(reason) => findings.problem(
            "alarm",
            format!("the broker accepts no messages: {reason}"),
            "`rabbitmq-diagnostics alarms` names the node: free memory or disk there, or raise \
             `vm_memory_high_watermark` or lower `disk_free_limit`. Queues that grow fill both: look at the queues below",
        ),
    }
}

/// Waits until the broker has answered a message, or has said that it takes none: it says so only to who sends one.
async fn answered_or_blocked(patient: &Patient<'_>) {
    let mut events = patient.transport.events();
    let answered = patient.transport.publish(to_nobody(patient, 0));
    let blocked =
        async { while matches!(events.recv().await, Ok(event) if !matches!(event, ConnectionEvent::Blocked(_))) {} };
    let either = async {
        tokio::select! {
            _ = answered => {}
            () = blocked => {}
        }
    };
    // When neither comes, the question for the largest message says so.
    let _ = tokio::time::timeout(patient.limit, either).await;
}

/// A message of this size that no queue takes.
fn to_nobody(patient: &Patient<'_>, size: usize) -> Publication {
    Publication {
        exchange: String::new(),
        key: format!("doctor.{}", patient.suffix),
        mandatory: false,
        properties: Properties::default(),
        body: vec![0; size].into(),
    }
}

/// How many queues one server can consume.
pub(super) fn channels(patient: &Patient<'_>, findings: &mut Findings) {
    let Some(room) = patient.transport.max_consumers() else { return };
    if room < FEW_QUEUES {
        findings.problem(
            "channel_max",
            format!("one server can consume only {room} queues: a service takes two, three with oneway methods"),
            "raise `channel_max` in rabbitmq.conf (2047 unless set), or take `?channel_max=` out of the address",
        );
    } else {
        findings.fine("channel_max", format!("one server can consume {room} queues"));
    }
}

/// The largest message. A message of that size is sent to nobody.
pub(super) async fn message_size(patient: &Patient<'_>, findings: &mut Findings) {
    let about = "max_message_size";
    if !patient.is_open() {
        return findings.unseen(about, "the broker accepts no messages: look again after the alarm");
    }
    match tokio::time::timeout(patient.limit, patient.transport.publish(to_nobody(patient, LARGEST))).await {
        Ok(Ok(Confirm::TooLarge(limit))) => findings.problem(
            about,
            format!("the broker takes messages of at most {}, and Hopline sends up to {}", bytes(limit as u64), bytes(LARGEST as u64)),
            format!("set `max_message_size = {LARGEST}` in rabbitmq.conf, or the `max_message_size` of all clients and servers to {limit}"),
        ),
        // Who may not publish there is told so only after the size was looked at.
        Ok(Ok(_)) => findings.fine(about, format!("at least {}", bytes(LARGEST as u64))),
        Ok(Err(lost)) if forbids(&lost.reason) => findings.fine(about, format!("at least {}", bytes(LARGEST as u64))),
        Ok(Err(lost)) => findings.unseen(about, &*lost.reason),
        Err(_) => findings.unseen(about, patient.late()),
    }
}

/// How long a call may be unsettled. No way leads to this setting from afar.
pub(super) fn consumer_timeout(patient: &Patient<'_>, findings: &mut Findings) {
    let about = "consumer_timeout";
    let greeting = patient.rabbit.greeting().unwrap_or_default();
    match release(&greeting.version) {
        Some(release) if release >= WITHOUT_TIMEOUT => findings.fine(about, "it does not hold for Hopline's queues"),
        _ => findings.unseen(
            about,
            "the broker tells it only on its own machine: `rabbitmqctl eval 'application:get_env(rabbit, consumer_timeout).'` \
             has to be more than your longest handler takes, in milliseconds",
        ),
    }
}

/// What kind the exchanges are of, and whether they return what nobody gets. Returns whether all can be used.
pub(super) async fn exchanges(patient: &Patient<'_>, findings: &mut Findings) -> bool {
    let (mut there, mut absent) = (Vec::new(), Vec::new());
    for part in patient.namespace.exchanges() {
        let Declaration::Exchange(exchange) = &part else { continue };
        let about = format!("exchange `{}`", exchange.name);
        match patient.answered(patient.rabbit.compare(&part)).await {
            Ok(Comparison::Same) => there.push(exchange.name.clone()),
            Ok(Comparison::Absent) => absent.push(exchange.name.clone()),
            Ok(Comparison::Differs(differences)) => findings.problem(
                about,
                format!("it differs from what Hopline declares: {}", differences.join("; ")),
                "no client or server can use it: stop those who do, delete it in RabbitMQ's management page, and start one server, \
                 which declares it",
            ),
            Err(words) if forbids(&words) => {
                there.push(exchange.name.clone());
                findings.unseen(about, "this user may not declare it, so it cannot be compared: look as an administrator");
            }
            Err(words) => findings.unseen(about, words),
        }
    }
    if !there.is_empty() {
        findings.fine("exchanges", format!("{} are there", there.join(", ")));
    }
    if !absent.is_empty() {
        findings.fine(
            "exchanges",
            format!("{} are not there yet: the first server or client declares them", absent.join(", ")),
        );
    }
    let returning = [patient.namespace.rpc(), patient.namespace.oneway()];
    for exchange in returning.into_iter().filter(|name| there.contains(name)) {
        returned(patient, &exchange, findings).await;
    }
    there.len() == 4
}

/// Whether an exchange returns a message that no queue gets. This one expires at once wherever it comes to.
async fn returned(patient: &Patient<'_>, exchange: &str, findings: &mut Findings) {
    let about = format!("alternate exchange of `{exchange}`");
    if !patient.is_open() {
        return findings.unseen(about, "the broker accepts no messages: look again after the alarm");
    }
    let publication = Publication {
        exchange: exchange.to_owned(),
        key: format!("doctor-{}.none", patient.suffix),
        mandatory: true,
        properties: Properties { expiration: Some(std::time::Duration::ZERO), ..Properties::default() },
        body: Vec::new().into(),
    };
    match tokio::time::timeout(patient.limit, patient.transport.publish(publication)).await {
        Ok(Ok(Confirm::Returned)) => findings.fine(about, "none that takes anything: calls that nobody serves come back"),
        Ok(Ok(_)) => findings.problem(
            about,
            "calls that nobody serves do not come back: they end as `Timeout` instead of `NoService`, and oneway calls are lost. \
             A policy with `alternate-exchange` catches the exchange, or somebody has bound a queue to it with `#`",
            format!("`rabbitmqctl list_policies` names it: give it a pattern that leaves out `{exchange}`"),
        ),
        Ok(Err(lost)) if forbids(&lost.reason) => {
            findings.unseen(about, format!("this user may not publish to it: {}", lost.reason))
        }
        Ok(Err(lost)) => findings.unseen(about, &*lost.reason),
        Err(_) => findings.unseen(about, patient.late()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_number() {
        assert!(release("3.9.29") < Some(OLDEST) && release("3.13.7") > Some(OLDEST));
        assert_eq!((release("4.3.0-rc.1"), release("4.3.0"), release("new")), (Some((4, 3)), Some((4, 3)), None));
    }
}
