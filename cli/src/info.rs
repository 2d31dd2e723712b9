//! `hopline info`: the instances of a service, and its methods.

use std::collections::{BTreeMap, BTreeSet};

use clap::Args;
use hopline::{Instance, MethodInfo, RuleInForce, ServiceSchema};

use crate::asking::{Asking, nobody, service};
use crate::failed::Failed;
use crate::printed::{age, json, one_line, print, table, time};

/// Show the instances of a service, and its methods.
///
/// Exits with 0 when an instance has replied, with 1 and an error on stderr when none has, and with 2 on wrong usage.
#[derive(Args)]
#[command(after_help = "Examples:\n  hopline info demo\n  hopline info billing.v2 --json")]
pub(crate) struct Info {
    /// SERVICE, or SERVICE.vMAJOR for a version other than 1
    #[arg(value_parser = service)]
    service: String,
    #[command(flatten)]
    asking: Asking,
}

impl Info {
    pub(crate) async fn run(self) -> Result<(), Failed> {
        self.asking
            .questions
            .ask(async |registry| {
                let mut instances = registry.instances(&self.service).await?;
                if instances.is_empty() {
                    return Err(nobody(&registry, &self.service).await);
                }
                let tells = instances.iter().flat_map(|instance| &instance.methods).any(|method| method.schema);
                // Without it, the declarations are shown as they are.
                if !self.asking.json
                    && tells
                    && let Ok(schema) = registry.schema(&self.service).await
                {
                    declare(&mut instances, &schema);
                }
                let shown = if self.asking.json { json(&instances) } else { shown(&instances) };
                Ok(print(&shown)?)
            })
            .await
    }
}

/// Writes the declarations in no particular language, those of which the schema is known. An instance may be of another
/// version than the one that has told it.
fn declare(instances: &mut [Instance], schema: &ServiceSchema) {
    let Some(told) = instances.iter().find(|instance| instance.instance == schema.instance) else { return };
    let told = told.methods.clone();
    for method in instances.iter_mut().flat_map(|instance| &mut instance.methods) {
        if told.contains(method)
            && let Some(described) = schema.method(&method.name).filter(|described| described.parameters.is_some())
        {
            method.signature = described.signature();
        }
    }
}

fn shown(instances: &[Instance]) -> String {
    let head = ["INSTANCE", "HOST", "PID", "UP", "HOPLINE", "ATTRIBUTES"].map(str::to_owned);
    let row = |instance: &Instance| {
        let attributes = instance.attributes.iter().map(|(name, value)| format!("{name}={value}"));
        let state = match (instance.draining, instance.quarantined) {
            (true, _) => "  (drains)",
            (false, true) => "  (quarantined)",
            (false, false) => "",
        };
        [
            format!("{}{state}", instance.instance),
            instance.host.clone(),
            if instance.pid == 0 { "-".to_owned() } else { instance.pid.to_string() },
            age(instance.started_at_ms),
            instance.hopline.clone(),
            attributes.collect::<Vec<_>>().join(" "),
        ]
    };
    let instances_shown = table(std::iter::once(head).chain(instances.iter().map(row)).collect());
    let methods = in_common(instances, |instance| instance.methods.iter().map(described).collect());
    let rules = in_common(instances, |instance| instance.rules.iter().flatten().map(ruled).collect());
    let rules = if rules.is_empty() { rules } else { format!("\n\nRULES\n{rules}") };
    format!("{instances_shown}\n\nMETHODS\n{methods}{rules}")
}

/// A line for each of what instances tell. While a new version is rolled out, or a rule is just being set, not all of them
/// tell the same.
fn in_common(instances: &[Instance], told: impl Fn(&Instance) -> BTreeSet<String>) -> String {
    let mut lines = BTreeMap::<String, usize>::new();
    for told in instances.iter().flat_map(told) {
        *lines.entry(told).or_default() += 1;
    }
    let line = |(line, count): (String, usize)| match count == instances.len() {
        true => line,
        false => format!("{line}  ({count} of {} instances)", instances.len()),
    };
    lines.into_iter().map(line).collect::<Vec<_>>().join("\n")
}

/// A rule that a server goes by, and who has set it.
fn ruled(rule: &RuleInForce) -> String {
    let RuleInForce { target, settings, user, client, at_ms, .. } = rule;
    let user = user.as_ref().map(|user| format!("{user}, ")).unwrap_or_default();
    one_line(&format!("{target}  {settings}  (set by {user}{client}, {} ago)", age(*at_ms)))
}

/// A method with what sets it apart.
fn described(method: &MethodInfo) -> String {
    let millis = |name: &str, millis: Option<u64>| {
        millis.map(|millis| format!("{name}={}", time(std::time::Duration::from_millis(millis))))
    };
    let flag = |name: &str, is_set: bool| is_set.then(|| name.to_owned());
    let natures = [
        flag("oneway", method.oneway),
        flag("idempotent", method.idempotent),
        flag("finishes", method.finishes),
        millis("dedup", method.dedup_ms),
        millis("timeout", method.timeout_ms),
    ];
    let natures: Vec<_> = natures.into_iter().flatten().collect();
    let signature = one_line(&method.signature);
    if natures.is_empty() { signature } else { format!("{signature}  [{}]", natures.join(" ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_method_that_not_all_have_says_so() {
        let mut method = MethodInfo::default();
        (method.signature, method.idempotent, method.timeout_ms) = ("add(a: i64)".to_owned(), true, Some(2_000));
        let mut one = Instance::default();
        one.instance = "one".to_owned();
        one.attributes.insert("zone".to_owned(), "eu\n1".to_owned());
        let mut two = Instance::default();
        two.methods.push(method);
        let shown = shown(&[one, two]);
        assert!(shown.ends_with("METHODS\nadd(a: i64)  [idempotent timeout=2s]  (1 of 2 instances)"), "{shown}");
        assert!(shown.contains("zone=eu 1"), "{shown}");
    }

    #[test]
    fn rules_in_force_are_shown_with_who_has_set_them() {
        let mut rule = RuleInForce::default();
        (rule.target, rule.settings) = ("demo.v1.add".to_owned(), "server_rate=5/s".to_owned());
        (rule.user, rule.client) = (Some("guest".to_owned()), "me".to_owned());
        let mut one = Instance::default();
        one.rules = Some(vec![rule]);
        let shown = shown(&[one, Instance::default()]);
        assert!(shown.contains("RULES\ndemo.v1.add  server_rate=5/s  (set by guest, me, "), "{shown}");
        assert!(shown.ends_with(" ago)  (1 of 2 instances)"), "{shown}");
    }
}
