//! What only the management API tells: nodes, plugins, all queues, and the policies that catch them.

use std::collections::{BTreeMap, BTreeSet};

use hopline::ServiceId;
use hopline::topology::QueueRole;
use serde_json::Value;

use super::Patient;
use super::finding::Findings;
use super::management::Management;
use super::policies::{Definition, harm};

/// What is asked of each queue. More would take long.
const COLUMNS: &str = "name,policy,operator_policy,effective_policy_definition,state";

/// Looks at all of it. Returns the services that have queues.
pub(super) async fn looked_at(
    patient: &Patient<'_>,
    management: &Management,
    findings: &mut Findings,
) -> BTreeSet<ServiceId> {
    match management.get("nodes").await {
        Ok(all) => nodes(&all, findings),
        Err(why) => {
            for about in ["nodes", "plugins"] {
                findings.unseen(about, &why);
            }
        }
    }
    let mut caught = Caught::default();
    let asked = async {
        let policies = management.get("policies/VHOST").await?;
        Ok((policies, management.get("exchanges/VHOST?columns=name,policy").await?))
    };
    let on_exchanges: Result<(), String> =
        asked.await.map(|(policies, exchanges)| caught.exchanges(patient, &policies, &exchanges));
    let on_queues = management.get(&format!("queues/VHOST?columns={COLUMNS}")).await;
    let on_queues = on_queues.map(|queues| caught.queues(patient, &queues, findings));
    caught.told(findings);
    if caught.0.is_empty() && on_exchanges.is_ok() && on_queues.is_ok() {
        findings.fine("policies", "none does harm to what is there");
    }
    if let Err(why) = on_exchanges {
        findings.unseen("policies on exchanges", why);
    }
    on_queues.unwrap_or_else(|why| {
        findings.unseen("policies on queues", why);
        BTreeSet::new()
    })
}

/// Nodes and their plugins.
fn nodes(all: &Value, findings: &mut Findings) {
    let all = list(all);
    let (mut plugins, mut well) = (BTreeSet::new(), 0);
    for node in all {
        let name = text(&node["name"]);
        let about = format!("node `{name}`");
        let is = |what: &str| node[what] == true;
        plugins.extend(list(&node["enabled_plugins"]).iter().filter_map(Value::as_str));
        if node["running"] == false {
            findings.problem(about, "it does not run", "start it: queues that lie on it alone cannot be reached");
            continue;
        }
        let partitions: Vec<_> = list(&node["partitions"]).iter().map(text).collect();
        for (is, found, advice) in [
            (
                is("mem_alarm"),
                "it is short of memory, and the broker accepts no messages",
                "free memory there, or raise `vm_memory_high_watermark`",
            ),
            (
                is("disk_free_alarm"),
                "it is short of disk, and the broker accepts no messages",
                "free disk there, or lower `disk_free_limit`",
            ),
            (is("being_drained"), "it is in maintenance", "`rabbitmq-upgrade revive` ends that"),
        ] {
            if is {
                findings.problem(&about, found, advice);
            }
        }
        if !partitions.is_empty() {
            findings.problem(
                &about,
                format!("it is cut off from {}", partitions.join(", ")),
                "mend the network between them, and restart the nodes of the smaller side: see the guide's page Clusters",
            );
        }
        well += 1;
    }
    findings.fine("nodes", format!("{well} of {} run", all.len()));
    let named: Vec<_> = plugins.into_iter().collect();
    findings.fine(
        "plugins",
        format!(
            "{}; Hopline needs none, and uses rabbitmq_event_exchange",
            if named.is_empty() { "none".to_owned() } else { named.join(", ") }
        ),
    );
}

/// What policies do: by policy, part and effect, the names of what they catch.
#[derive(Default)]
struct Caught(BTreeMap<(String, String, &'static str), Vec<String>>);

impl Caught {
    fn add(&mut self, policy: String, part: String, does: &'static str, name: &str) {
        self.0.entry((policy, part, does)).or_default().push(name.to_owned());
    }

    fn exchanges(&mut self, patient: &Patient<'_>, policies: &Value, exchanges: &Value) {
        for exchange in list(exchanges) {
            let (name, policy) = (text(&exchange["name"]), text(&exchange["policy"]));
            let does = match &name {
                name if *name == patient.namespace.rpc() => {
                    "once a queue is bound there, calls that nobody serves do not come back: they end as `Timeout` instead of `NoService`"
                }
                name if *name == patient.namespace.oneway() => "oneway calls that no server takes are lost",
                _ => continue,
            };
            let definition = list(policies).iter().find(|it| it["name"] == *policy).map(|it| &it["definition"]);
            if let Some(other) = definition.and_then(|definition| definition.get("alternate-exchange")) {
                self.add(format!("policy `{policy}`"), format!("alternate-exchange = {other}"), does, &name);
            }
        }
    }

    /// Notes the policies on queues, and says which queues are not well. Returns the services that have queues.
    fn queues(&mut self, patient: &Patient<'_>, queues: &Value, findings: &mut Findings) -> BTreeSet<ServiceId> {
        let mut services = BTreeSet::new();
        for queue in list(queues) {
            let name = text(&queue["name"]);
            let Some((role, service)) = patient.namespace.role(&name) else { continue };
            services.extend(service.filter(|_| role != QueueRole::Own));
            let named = |member: &str, kind: &str| {
                let policy = text(&queue[member]);
                (!policy.is_empty()).then(|| format!("{kind} `{policy}`"))
            };
            let by = [named("policy", "policy"), named("operator_policy", "operator policy")];
            let by = by.into_iter().flatten().collect::<Vec<_>>().join(" or ");
            let none = Definition::new();
            let definition = queue["effective_policy_definition"].as_object().unwrap_or(&none);
            for (part, does) in harm(role, definition) {
                self.add(by.clone(), part, does, &name);
            }
            if let Some(state @ ("down" | "minority" | "stopped" | "crashed")) = queue["state"].as_str() {
                findings.problem(
                    format!("queue `{name}`"),
                    format!("its state is `{state}`"),
                    "start the nodes that it lies on: `rabbitmqctl cluster_status` names those that do not run",
                );
            }
        }
        services
    }

    fn told(&self, findings: &mut Findings) {
        for ((policy, part, does), names) in &self.0 {
            let more = match names.len() - 1 {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            findings.problem(
                policy,
                format!("{part} on `{}`{more}: {does}", names[0]),
                "give it a pattern that leaves out this name, or take it away: `rabbitmqctl list_policies` and \
                 `list_operator_policies` show it, `set_policy` replaces it",
            );
        }
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
