//! The instances that run, and their clocks.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use hopline::{Error, InstanceStats, ServiceId};

use super::finding::Findings;
use super::{Doctor, Patient};
use crate::address::{left, one_line};
use crate::failed::Failed;
use crate::printed::time;

/// How far a clock may be off, in milliseconds. Time-outs do not go by clocks, but logs and the time in queues do.
const TOLERANCE: u64 = 1_000;

/// Asks all instances, and compares their clocks with the one here. Returns the services that they serve, and how many
/// instances of each have replied; `None` if they could not be asked.
pub(super) async fn compared(
    doctor: &Doctor,
    patient: &Patient<'_>,
    findings: &mut Findings,
) -> Result<Option<BTreeMap<ServiceId, usize>>, Failed> {
    if !patient.is_open() {
        findings.unseen("clocks", "the broker accepts no messages: look again after the alarm");
        return Ok(None);
    }
    let builder = doctor.address.client(doctor.timeout)?.namespace(&doctor.namespace.namespace);
    let asked = async {
        let client = builder.connect(&doctor.address.url).await?;
        let before = now();
        let all = client.registry().all_stats().await;
        let after = now();
        left(&client).await;
        Ok::<_, Error>((before, all?, after))
    };
    let (before, instances, after) = match asked.await {
        Ok(asked) => asked,
        Err(error) => {
            findings.unseen("instances and their clocks", one_line(&error));
            return Ok(None);
        }
    };
    let mut good = 0;
    for stats in &instances {
        let InstanceStats { service, instance, now_ms, .. } = stats;
        let about = format!("clock of instance `{instance}` of `{service}`");
        match off(*now_ms, before, after) {
            _ if *now_ms == 0 => findings.unseen(about, "it does not tell the time: it runs an older version of Hopline"),
            0 => good += 1,
            by => findings.problem(
                about,
                format!(
                    "it is {} {} the one here",
                    time(std::time::Duration::from_millis(by.unsigned_abs())),
                    if by < 0 { "behind" } else { "ahead of" }
                ),
                "calls do not go by it, but the times in logs, `hopline stats` and dead letters do: set both clocks by NTP \
                 (`timedatectl`)",
            ),
        }
    }
    match instances.len() {
        0 => findings.fine("instances", "none replies"),
        all => findings.fine("instances", format!("{all} reply, and {good} of them have the same time")),
    }
    let mut services = BTreeMap::new();
    for service in instances.iter().filter_map(|stats| stats.service.parse().ok()) {
        *services.entry(service).or_default() += 1;
    }
    Ok(Some(services))
}

/// By how many milliseconds a clock is off that showed `told` at some time between `before` and `after`. 0 if that can be.
fn off(told: u64, before: u64, after: u64) -> i64 {
    let by = |amount: u64| i64::try_from(amount).unwrap_or(i64::MAX);
    if told.saturating_add(TOLERANCE) < before {
        -by(before - told)
    } else if told > after.saturating_add(TOLERANCE) {
        by(told - after)
    } else {
        0
    }
}

fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_off_only_if_no_moment_of_the_question_explains_it() {
        assert_eq!([9_000, 10_000, 12_000, 13_000].map(|told| off(told, 10_000, 12_000)), [0; 4]);
        assert_eq!((off(8_999, 10_000, 12_000), off(13_001, 10_000, 12_000)), (-1_001, 1_001));
        assert_eq!(off(u64::MAX, 0, 0), i64::MAX);
    }
}
