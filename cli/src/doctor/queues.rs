//! The queues of services: whether they are as Hopline declares them, and what waits in them.

use std::collections::{BTreeMap, BTreeSet};

use hopline::QueueCount;
use hopline::ServiceId;
use hopline::topology::{Declaration, QueueRole};
use hopline::transport::rabbit::Comparison;

use super::finding::Findings;
use super::{Patient, forbids};

/// Looks at the queues of these services, and at the catalogue. Returns how many read the calls of each service.
pub(super) async fn compared(
    patient: &Patient<'_>,
    services: &BTreeSet<ServiceId>,
    findings: &mut Findings,
) -> BTreeMap<ServiceId, u32> {
    let (mut good, mut readers) = (0, BTreeMap::new());
    let all = services.iter().flat_map(|service| {
        let of = move |(role, part)| (role, Some(service), part);
        patient.namespace.queues_of(service).into_iter().map(of)
    });
    for (role, service, part) in all.chain([(QueueRole::Catalogue, None, patient.namespace.catalogue())]) {
        let Declaration::Queue(queue) = &part else { continue };
        let about = format!("queue `{}`", queue.name);
        match patient.answered(patient.rabbit.compare(&part)).await {
            Ok(Comparison::Absent) => continue,
            Ok(Comparison::Same) => good += 1,
            Ok(Comparison::Differs(differences)) => match wrong(role, service.is_some_and(ServiceId::is_group), differences) {
                differences if differences.is_empty() => good += 1,
                differences => findings.problem(
                    &about,
                    format!("it differs from what Hopline declares: {}", differences.join("; ")),
                    "servers fail with `Mismatch`, or are `Degraded`: stop them, delete the queue when it is empty, and start \
                     them: see \"Queues with other arguments\" in the guide's page Changing a contract",
                ),
            },
            Err(words) if forbids(&words) => {
                findings.unseen(format!("arguments of the {about}"), "this user may not declare it: look as the user of its servers");
            }
            Err(words) => findings.unseen(&about, words),
        }
        match patient.answered(patient.rabbit.count(&queue.name)).await {
            Ok(Some(count)) => {
                if let Some(service) = service.filter(|_| role == QueueRole::Calls) {
                    readers.insert(service.clone(), count.consumers);
                }
                waiting(role, service, &about, count, findings);
            }
            Ok(None) => {}
            Err(words) => findings.unseen(format!("messages in the {about}"), words),
        }
    }
    findings
        .fine("queues", format!("{} services are known; {good} queues are as Hopline declares them", services.len()));
    readers
}

/// The differences that no option of a service or a group explains. Each begins with the argument, in backticks.
fn wrong(role: QueueRole, is_group: bool, differences: Vec<String>) -> Vec<String> {
    let has_options = role == QueueRole::Calls || (role == QueueRole::Work && is_group);
    if !has_options {
        return differences;
    }
    let refuses = differences.iter().any(|it| it.starts_with("`x-overflow` is reject-publish"));
    let is_option = |it: &String| match it.split('`').nth(1) {
        Some("x-single-active-consumer") => is_group,
        Some("x-expires" | "x-max-priority") => !is_group && !it.contains("is not set"),
        Some("x-max-length") => refuses,
        Some("x-overflow") => it.contains("is reject-publish"),
        Some("x-queue-type") => !is_group && it.contains("is quorum"),
        _ => false,
    };
    differences.into_iter().filter(|it| !is_option(it)).collect()
}

/// What waits there, if that is more than it should be.
fn waiting(
    role: QueueRole,
    service: Option<&ServiceId>,
    about: &str,
    QueueCount { waiting: ready, consumers }: QueueCount,
    findings: &mut Findings,
) {
    let Some(service) = service.filter(|_| ready > 0) else { return };
    match role {
        QueueRole::Work if consumers == 0 && service.is_group() => {
            let group = service.name();
            findings.problem(
                about,
                format!("nobody of the group `{group}` is up, and {ready} messages with events wait for it"),
                format!("start a server that subscribes as it, or end the group by `hopline groups rm {group}`"),
            );
        }
        QueueRole::Calls | QueueRole::Work if consumers == 0 => findings.problem(
            about,
            format!("{ready} calls wait in it, and nobody consumes it"),
            format!("start a server of `{service}`; if one runs, `Running::health` or its log says why it does not consume the queue"),
        ),
        QueueRole::Dead => findings.problem(
            about,
            format!("{ready} dead letters wait in it"),
            format!(
                "`hopline dead ls {service}` says why they failed; then `hopline dead replay {service}` has them run again, and \
                 `hopline dead drop {service}` drops them"
            ),
        ),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_a_service_are_no_faults_and_everything_else_is() {
        let of = |role, is_group, differences: &[&str]| {
            wrong(role, is_group, differences.iter().map(|it| (*it).to_owned()).collect()).len()
        };
        let wrong = |role, differences: &[&str]| of(role, false, differences);
        let limited = "`x-max-length` is 10, but not declared here";
        let refusing = "`x-overflow` is reject-publish, but not declared here";
        let quorum = "`x-queue-type` is quorum, not classic as declared here";
        let grace = "`x-expires` is 5000, not 60000 as declared here";
        assert_eq!(wrong(QueueRole::Calls, &[limited, refusing, quorum, grace]), 0);
        assert_eq!(wrong(QueueRole::Calls, &[limited]), 1, "it drops what is too much");
        assert_eq!(wrong(QueueRole::Calls, &["`x-expires` is not set, but declared here as 60000"]), 1);
        assert_eq!(wrong(QueueRole::Calls, &["`durable` is false, not true as declared here"]), 1);
        assert_eq!(wrong(QueueRole::Work, &[limited, refusing]), 2);
        let in_order = "`x-single-active-consumer` is true, but not declared here";
        assert_eq!(of(QueueRole::Work, true, &[limited, refusing, in_order]), 0);
        assert_eq!(wrong(QueueRole::Work, &[in_order]), 1);
    }
}
