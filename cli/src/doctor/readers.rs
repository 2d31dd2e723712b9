//! Services that have more readers than instances reply: the others hang, and get calls all the same.

use std::collections::BTreeMap;

use hopline::{Error, Registry, ServiceId};

use super::Doctor;
use super::finding::Findings;
use crate::address::{closed, one_line};
use crate::failed::Failed;

/// Asks the instances of each service once more that has more readers of its calls than instances have replied.
pub(super) async fn asked(
    doctor: &Doctor,
    readers: &BTreeMap<ServiceId, u32>,
    replying: &BTreeMap<ServiceId, usize>,
    findings: &mut Findings,
) -> Result<(), Failed> {
    let lacks = |(service, readers): &(&ServiceId, &u32)| {
        **readers as usize > replying.get(service).copied().unwrap_or_default()
    };
    let suspects: Vec<_> = readers.iter().filter(lacks).map(|(service, _)| service.to_string()).collect();
    if suspects.is_empty() {
        return Ok(());
    }
    let builder = doctor.address.client(doctor.timeout)?.namespace(&doctor.namespace.namespace);
    let client = match builder.connect(&doctor.address.url).await {
        Ok(client) => client,
        Err(error) => {
            findings.unseen("instances that do not reply", one_line(&error));
            return Ok(());
        }
    };
    let registry = client.registry();
    let asked = futures::future::join_all(suspects.iter().map(|service| counted(&registry, service))).await;
    closed(client.close()).await;
    for (service, counted) in suspects.iter().zip(asked) {
        told(service, counted, findings);
    }
    Ok(())
}

/// How many instances of a service reply, and how many read its calls after that: who comes or goes meanwhile is no
/// suspect.
async fn counted(registry: &Registry, service: &str) -> Result<(usize, usize), Error> {
    let replying = registry.ping(service).await?.len();
    let calls = registry.queues(service).await?.calls;
    Ok((replying, calls.map_or(0, |calls| calls.consumers as usize)))
}

fn told(service: &str, counted: Result<(usize, usize), Error>, findings: &mut Findings) {
    match counted {
        Ok((replying, readers)) if readers > replying => findings.problem(
            format!("service `{service}`"),
            format!(
                "{readers} read its calls, and {replying} of them reply: each of the others gets calls, and hangs, is suspended, \
                 or may not reply"
            ),
            format!(
                "`hopline ping {service}` names those that reply. Of the others, look at the log and start the process anew: what it \
                 holds then goes to another. `rabbitmqctl list_connections client_properties` names their programs"
            ),
        ),
        Ok(_) => {}
        // A server's rule may forbid this user to ask.
        Err(error) => findings.unseen(format!("instances of `{service}` that do not reply"), one_line(&error)),
    }
}
