//! `hopline doctor`: what is wrong with a broker for Hopline, and what to do about it.

mod clocks;
mod finding;
mod management;
mod nodes;
mod permissions;
mod policies;
mod probes;
mod queues;
mod readers;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use hopline::transport::Transport;
use hopline::transport::rabbit::RabbitConnection;
use hopline::{Error, ServiceId, environment, topology};

use self::finding::Findings;
use self::management::Management;
use crate::address::{Address, Namespace, closed, one_line, within};
use crate::asking::service;
use crate::failed::Failed;
use crate::printed::print;

/// What is told of whatever only the management API knows.
const NEEDS_MANAGEMENT: &str = "needs the management API: `--management URL`";

/// Say what is wrong with the broker for Hopline, and what to do about it.
///
/// It looks at the version, alarms, limits, permissions, exchanges, queues, dead letters, clocks and instances that do not
/// reply, and with `--management` also at policies, plugins and nodes. It changes nothing: what it declares goes when it ends. Exits with
/// 0 if all is well, with 1 if there is a problem or no connection, and with 2 on wrong usage. What could not be looked at
/// is told with the reason, and is no problem.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  hopline doctor --url amqp://user:password@broker.example.com\n  hopline doctor billing --management http://broker.example.com:15672 --json"
)]
pub(crate) struct Doctor {
    /// Services, as SERVICE or SERVICE.vMAJOR: whether this user may serve them, and their queues even if nobody serves
    /// them
    #[arg(value_parser = service)]
    services: Vec<String>,
    #[command(flatten)]
    address: Address,
    #[command(flatten)]
    namespace: Namespace,
    /// RabbitMQ's management API, such as http://broker.example.com:15672. User and password are those of `--url`,
    /// unless they are in it
    #[arg(long, value_name = "URL")]
    management: Option<String>,
    /// How long the broker may take for each answer, such as 500ms or 5s
    #[arg(long, value_parser = environment::duration, default_value = "8s")]
    timeout: Duration,
    /// Print JSON: a list of objects
    #[arg(long)]
    json: bool,
}

/// The broker, as it is looked at.
struct Patient<'a> {
    transport: &'a Transport,
    rabbit: &'a RabbitConnection,
    namespace: &'a topology::Namespace,
    /// How long the broker may take for each answer.
    limit: Duration,
    /// A part of names that nobody else has.
    suffix: String,
}

impl Patient<'_> {
    /// The answer of the broker, or in one line why there is none.
    async fn answered<T>(&self, answer: impl Future<Output = Result<T, Error>>) -> Result<T, String> {
        let answered = tokio::time::timeout(self.limit, answer).await;
        answered.map_or_else(|_| Err(self.late()), |answer| answer.map_err(|error| one_line(&error)))
    }

    fn late(&self) -> String {
        format!("the broker has not answered within {:?}: allow more with `--timeout`", self.limit)
    }

    /// Whether the broker accepts messages, which some questions need.
    fn is_open(&self) -> bool {
        self.transport.blocked().is_none()
    }

    /// The user that the broker knows us as.
    fn user(&self) -> &str {
        self.transport.user().unwrap_or("of this connection")
    }
}

impl Doctor {
    pub(crate) async fn run(self) -> Result<(), Failed> {
        let management = Management::new(self.management.as_deref(), &self.address)?;
        let builder = self.address.dead_letters(self.timeout)?.namespace(&self.namespace.namespace);
        let mut findings = Findings::default();
        match within(self.timeout, builder.transport(&self.address.url), Failed::run).await {
            Ok((transport, namespace)) => {
                let Transport::Rabbit(rabbit) = &transport else {
                    return Err(Error::Invalid(
                        "`memory://` is a broker inside of one process: give the address of a RabbitMQ with `--url`"
                            .to_owned(),
                    )
                    .into());
                };
                let patient = Patient {
                    transport: &transport,
                    rabbit,
                    namespace: &namespace,
                    limit: self.timeout,
                    suffix: unique(),
                };
                self.examine(&patient, management.as_ref(), &mut findings).await?;
                closed(transport.close()).await;
            }
            Err(failed) if failed.is_usage() => return Err(failed),
            Err(failed) => findings.problem(
                "connection",
                failed.to_string(),
                "see \"There is no connection\" in the guide's page Troubleshooting",
            ),
        }
        print(&findings.told(self.json))?;
        match findings.problems() {
            0 => Ok(()),
            1 => Err(Failed::run("there is 1 problem".to_owned())),
            several => Err(Failed::run(format!("there are {several} problems"))),
        }
    }

    async fn examine(
        &self,
        patient: &Patient<'_>,
        management: Option<&Management>,
        findings: &mut Findings,
    ) -> Result<(), Failed> {
        let asked = self.services.iter().map(|service| service.parse()).collect::<Result<BTreeSet<ServiceId>, _>>()?;
        probes::broker(patient, findings);
        probes::alarm(patient, findings).await;
        probes::channels(patient, findings);
        probes::message_size(patient, findings).await;
        probes::consumer_timeout(patient, findings);
        permissions::of_a_client(patient, findings).await;
        permissions::to_hear_of_deletions(patient, findings).await;
        for service in &asked {
            permissions::of_a_server(patient, service, findings).await;
        }
        if asked.is_empty() {
            findings.unseen("permissions of a server", "name its service: `hopline doctor SERVICE`");
        }
        let are_there = probes::exchanges(patient, findings).await;
        let mut services = asked;
        services.extend(self.catalogued(findings).await?);
        let mut replying = None;
        // A client would declare the exchanges.
        match are_there {
            true => replying = clocks::compared(self, patient, findings).await?,
            false => findings.unseen("clocks", "nobody can be asked before the exchanges are there as they should be"),
        }
        services.extend(replying.iter().flat_map(BTreeMap::keys).cloned());
        match management {
            Some(management) => services.extend(nodes::looked_at(patient, management, findings).await),
            None => {
                for about in ["policies", "plugins", "nodes", "queues of services that do not run"] {
                    findings.unseen(about, NEEDS_MANAGEMENT);
                }
            }
        }
        let readers = queues::compared(patient, &services, findings).await;
        if let Some(replying) = replying {
            readers::asked(self, &readers, &replying, findings).await?;
        }
        Ok(())
    }

    /// The services that have had dead letters, or could.
    async fn catalogued(&self, findings: &mut Findings) -> Result<Vec<ServiceId>, Failed> {
        let builder = self.address.dead_letters(self.timeout)?.timeout(self.timeout);
        match builder.namespace(&self.namespace.namespace).counts(&self.address.url).await {
            Ok(counts) => Ok(counts.iter().filter_map(|(service, _)| service.parse().ok()).collect()),
            Err(error) => {
                findings.unseen("services in the catalogue", one_line(&error));
                Ok(Vec::new())
            }
        }
    }
}

/// A part of names that nobody else has.
fn unique() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{}-{}", std::process::id(), now.as_nanos())
}

/// Whether these words of the broker mean that a permission is missing.
fn forbids(words: &str) -> bool {
    words.contains("ACCESS_REFUSED")
}
