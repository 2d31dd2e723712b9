//! Each option and each shape of argument and result, implemented with plain `async fn`.
#![deny(missing_docs, missing_debug_implementations, warnings)]

use hopline::{Call, Client, Context, Oneway, Service};
use serde::{Deserialize, Serialize};

/// What division fails with.
#[derive(Debug, Serialize, Deserialize)]
pub enum MathError {
    /// The divisor was zero.
    DivisionByZero,
}

/// Sums.
#[hopline::service(name = "sums-2", version = 3)]
pub trait Calculator: Send + Sync {
    /// Adds.
    async fn add(&self, a: i64, b: i64) -> i64;
    /// Divides.
    async fn div(&self, a: i64, b: i64) -> Result<i64, MathError>;
    /// Divides too.
    async fn divide(&self, a: i64, b: i64) -> ::core::result::Result<(), MathError>;
    /// Computes.
    #[rpc(idempotent, timeout = "2s")]
    async fn pi(&self, ctx: &Context, digits: u32) -> String;
    /// Computes, at a path.
    #[rpc(idempotent)]
    #[rpc(timeout = "1m", dedup = "10m")]
    async fn tau(&self, context: &hopline::Context) -> f64;
    /// Computes, and is asked often.
    #[rpc(idempotent, retry = 2, cache = "5s", stale = "30s")]
    async fn e(&self) -> f64;
    /// Computes, if it can.
    #[rpc(retry = 1)]
    async fn phi(&self) -> f64;
    /// Computes, with patience.
    #[rpc(idempotent, retry = 1, retry_on(MathError::DivisionByZero), hedge)]
    async fn chi(&self) -> Result<f64, MathError>;
    /// Computes, twice.
    #[rpc(idempotent, retry_on(| MathError::DivisionByZero), fork = 2)]
    async fn psi(&self) -> Result<f64, MathError>;
    /// Notes, now or later.
    #[rpc(idempotent, fail_back, attempts = 3, pause = "1s")]
    async fn omega(&self) -> Result<(), MathError>;
    /// Writes.
    #[rpc(oneway)]
    async fn log(&self, line: String);
    /// Writes with a context.
    #[rpc(oneway, name = "log-2")]
    async fn log_twice(&self, ctx: &Context, line: String) -> ();
    /// Does nothing.
    #[rpc(name = "nothing")]
    async fn noop(&self);
    /// Takes one collection.
    async fn sum(&self, numbers: Vec<Option<(u8, [i64; 4])>>) -> i64;
    /// Takes 16.
    async fn sixteen(
        &self,
        a: u8,
        b: u8,
        c: u8,
        d: u8,
        e: u8,
        f: u8,
        g: u8,
        h: u8,
        i: u8,
        j: u8,
        k: u8,
        l: u8,
        m: u8,
        n: u8,
        o: u8,
        p: u8,
    ) -> u64;
    /// Names that generated code might use too.
    async fn names(
        &self,
        service: u8,
        implementation: u8,
        context: u8,
        client: u8,
        result: u8,
    ) -> u8;
    /// A method of `Arc` and of the client itself.
    async fn clone(&self) -> u8;
    #[allow(non_snake_case, missing_docs)]
    async fn camelCase(&self) -> u8;
}

struct Calc;

impl Calculator for Calc {
    async fn add(&self, a: i64, b: i64) -> i64 {
        a + b
    }
    async fn div(&self, a: i64, b: i64) -> Result<i64, MathError> {
        a.checked_div(b).ok_or(MathError::DivisionByZero)
    }
    async fn divide(&self, _a: i64, _b: i64) -> Result<(), MathError> {
        Ok(())
    }
    async fn pi(&self, _ctx: &Context, digits: u32) -> String {
        digits.to_string()
    }
    async fn tau(&self, _context: &Context) -> f64 {
        6.5
    }
    async fn e(&self) -> f64 {
        2.7
    }
    async fn phi(&self) -> f64 {
        1.6
    }
    async fn chi(&self) -> Result<f64, MathError> {
        Ok(1.7)
    }
    async fn psi(&self) -> Result<f64, MathError> {
        Ok(3.4)
    }
    async fn omega(&self) -> Result<(), MathError> {
        Ok(())
    }
    async fn log(&self, _line: String) {}
    async fn log_twice(&self, _ctx: &Context, _line: String) {}
    async fn noop(&self) {}
    async fn sum(&self, numbers: Vec<Option<(u8, [i64; 4])>>) -> i64 {
        numbers.len() as i64
    }
    async fn sixteen(
        &self,
        a: u8,
        _b: u8,
        _c: u8,
        _d: u8,
        _e: u8,
        _f: u8,
        _g: u8,
        _h: u8,
        _i: u8,
        _j: u8,
        _k: u8,
        _l: u8,
        _m: u8,
        _n: u8,
        _o: u8,
        p: u8,
    ) -> u64 {
        u64::from(a + p)
    }
    async fn names(
        &self,
        service: u8,
        implementation: u8,
        context: u8,
        client: u8,
        result: u8,
    ) -> u8 {
        service + implementation + context + client + result
    }
    async fn clone(&self) -> u8 {
        1
    }
    async fn camelCase(&self) -> u8 {
        2
    }
}

/// What the client's methods return.
pub fn calls(client: &Client) {
    let calc = CalculatorClient::new(client);
    let _: Call<i64> = calc.add(1, 2);
    let _: Call<i64, MathError> = calc.div(1, 2);
    let _: Call<(), MathError> = calc.divide(1, 2);
    let _: Call<String> = calc.pi(5);
    let _: Call<f64> = calc.tau();
    let _: Call<f64> = calc.e();
    let _: Call<f64> = calc.phi();
    let _: Call<f64, MathError> = calc.chi();
    let _: Call<f64, MathError> = calc.psi();
    let _: Call<(), MathError> = calc.omega();
    let _: Call<Oneway> = calc.log(String::new());
    let _: Call<Oneway> = calc.log_twice(String::new());
    let _: Call<()> = calc.noop();
    let _: Call<i64> = calc.sum(Vec::new());
    let _: Call<u64> = calc.sixteen(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16);
    let _: Call<u8> = calc.names(1, 2, 3, 4, 5);
    let _: Call<u8> = calc.clone();
    let _: Call<u8> = calc.camelCase();
}

fn main() {
    let _: Service = CalculatorServer::new(Calc);
}
