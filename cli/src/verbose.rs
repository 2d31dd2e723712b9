//! `hopline call --verbose`: who answered, and how long each part took.

use std::time::Instant;

use hopline::{Error, Invocation, Middleware, Next, Reply};
use serde_json::json;

use crate::printed::{bytes, json, one_line, time};

/// Tells on stderr what is known of each call when it has ended.
pub(crate) struct Verbose {
    pub(crate) json: bool,
}

impl Middleware for Verbose {
    async fn handle(&self, call: Invocation, next: Next) -> Result<Reply, Error> {
        // A question of discovery is not the call.
        if call.method().contains('.') {
            return next.run(call).await;
        }
        let (arguments, began) = (call.payload().len() as u64, Instant::now());
        let outcome = next.run(call).await;
        let round_trip = began.elapsed();
        let reply = outcome.as_ref().ok();
        let instance = reply.and_then(Reply::instance);
        let handler = reply.and_then(Reply::handler_time);
        let result = reply.map(|reply| reply.payload().len() as u64);
        if self.json {
            let told = json!({
                "instance": instance, "round_trip_us": round_trip.as_micros() as u64,
                "handler_us": handler.map(|handler| handler.as_micros() as u64),
                "arguments_bytes": arguments, "result_bytes": result,
            });
            eprintln!("{}", json(&told));
            return outcome;
        }
        let parts = handler.map(|handler| {
            let rest = time(round_trip.saturating_sub(handler));
            format!(": {} in the handler, {rest} in the queue and on the way", time(handler))
        });
        eprintln!("instance    {}", instance.map_or_else(|| "-".to_owned(), one_line));
        eprintln!("round trip  {}{}", time(round_trip), parts.unwrap_or_default());
        eprintln!("arguments   {}", bytes(arguments));
        eprintln!("result      {}", result.map_or_else(|| "-".to_owned(), bytes));
        outcome
    }
}
