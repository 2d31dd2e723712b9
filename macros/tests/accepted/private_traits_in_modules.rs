//! The generated types see what the trait sees, have its visibility, and may stay unused.
#![deny(warnings, unreachable_pub)]

mod bank {
    mod money {
        #[derive(Debug, serde::Serialize, serde::Deserialize)]
        pub(crate) struct Cents(pub(crate) u64);
    }

    use money::Cents;

    #[hopline::service]
    pub(crate) trait Bank {
        async fn balance(&self, account: String) -> Cents;
        async fn transfer(&self, amount: Cents) -> Result<Cents, String>;
    }

    pub(super) struct Vault;

    impl Bank for Vault {
        async fn balance(&self, account: String) -> Cents {
            Cents(account.len() as u64)
        }
        async fn transfer(&self, amount: Cents) -> Result<Cents, String> {
            Err(format!("{} is too much", amount.0))
        }
    }
}

#[hopline::service]
trait Unused {
    async fn never(&self);
}

#[hopline::service()]
trait Empty {}

// Names of the prelude and of the standard library may mean something else here.
mod shadows {
    #![allow(dead_code, non_camel_case_types)]
    type Option = u8;
    type Result<A, B> = ::std::result::Result<A, B>;
    struct T;
    struct Ok;
    struct Some;
    struct Arc;
    struct Send;
    struct Sync;
    struct Future;
    mod core {}
    mod std {}
    mod hopline {}

    #[::hopline::service]
    trait Shadowed {
        async fn get(&self, option: Option) -> u8;
        async fn set(&self, value: Option) -> Result<u8, u8> {
            ::core::result::Result::Ok(value)
        }
    }
}

// Through `macro_rules!`, types and literals arrive in groups.
macro_rules! service_of {
    ($name:ident, $wire:literal, $argument:ident: $ty:ty, $result:ty) => {
        #[hopline::service(name = $wire)]
        trait $name {
            async fn put(&self, ctx: &hopline::Context, $argument: $ty) -> $result;
            async fn again(&self, ctx: &hopline::Context, value: $ty) -> $result {
                self.put(ctx, value).await
            }
        }
    };
}
service_of!(Numbers, "numbers", number: u64, Result<u64, String>);

fn main() {
    let _ = bank::BankServer::new(bank::Vault);
}
