//! The service that `server` serves and `client`, `broadcast` and `hopline call` call.

use std::time::{Duration, Instant};

use hopline::Context;
use serde::{Deserialize, Serialize};

/// A result of two values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ExpReply {
    /// `base` to the power of `exp`; wraps around where `i64` ends.
    pub(crate) value: i64,
    /// How long that took.
    pub(crate) cost_nanos: u64,
}

/// The error of a method, as any serde type can be one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum MathError {
    /// There is no such number.
    DivisionByZero,
}

/// The methods of the service.
#[hopline::service]
pub(crate) trait Demo {
    /// The Fibonacci number at `n`, where those at 0 and 1 are 1; wraps around where `u64` ends.
    #[rpc(idempotent)]
    async fn fib(&self, n: u32) -> u64;
    /// `base` to the power of `exp`.
    #[rpc(idempotent)]
    async fn exp(&self, base: i64, exp: u32) -> ExpReply;
    /// Returns its argument.
    #[rpc(idempotent)]
    async fn echo(&self, bytes: Vec<u8>) -> Vec<u8>;
    /// The sum.
    async fn add(&self, a: i64, b: i64) -> i64;
    /// The quotient.
    async fn div(&self, a: i64, b: i64) -> Result<i64, MathError>;
    /// Sleeps for this many milliseconds.
    async fn sleep(&self, ms: u64);
    /// Panics. The server keeps running.
    async fn panic(&self);
    /// The id of the instance that runs the call.
    #[rpc(idempotent)]
    async fn whoami(&self, ctx: &Context) -> String;
    /// Prints `note: LINE` where it runs, once for each call.
    #[rpc(oneway, dedup = "10m")]
    async fn note(&self, line: String);
}

/// Serves [`Demo`].
pub(crate) struct Service;

impl Demo for Service {
    async fn fib(&self, n: u32) -> u64 {
        let (mut this, mut next) = (1_u64, 1_u64);
        for _ in 0..n {
            (this, next) = (next, this.wrapping_add(next));
        }
        this
    }

    async fn exp(&self, base: i64, exp: u32) -> ExpReply {
        let started = Instant::now();
        let value = base.wrapping_pow(exp);
        ExpReply { value, cost_nanos: u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX) }
    }

    async fn echo(&self, bytes: Vec<u8>) -> Vec<u8> {
        bytes
    }

    async fn add(&self, a: i64, b: i64) -> i64 {
        a.wrapping_add(b)
    }

    async fn div(&self, a: i64, b: i64) -> Result<i64, MathError> {
        if b == 0 {
            return Err(MathError::DivisionByZero);
        }
        Ok(a.wrapping_div(b))
    }

    async fn sleep(&self, ms: u64) {
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }

    async fn panic(&self) {
        panic!("as asked");
    }

    async fn whoami(&self, ctx: &Context) -> String {
        ctx.instance().to_owned()
    }

    async fn note(&self, line: String) {
        println!("note: {line}");
    }
}

/// The broker's address: the first argument, else `HOPLINE_URL`, else `default`.
pub(crate) fn url(default: &str) -> String {
    let given = std::env::args().nth(1).or_else(|| std::env::var("HOPLINE_URL").ok());
    given.unwrap_or_else(|| default.to_owned())
}
