//! `#[cfg]` holds for the trait, the server and the client; `#[deprecated]` warns the caller only.
#![deny(warnings)]
#![allow(unexpected_cfgs)]

use hopline::Client;

#[hopline::service]
pub trait Store {
    async fn get(&self, key: String) -> u64;
    #[cfg(nobody_sets_this)]
    async fn missing(&self, value: DoesNotExist) -> DoesNotExist;
    #[cfg(not(nobody_sets_this))]
    async fn present(&self) -> u64;
    #[cfg(nobody_sets_this)]
    #[rpc(name = "either")]
    async fn one(&self) -> u64;
    #[cfg(not(nobody_sets_this))]
    #[rpc(name = "either")]
    async fn other(&self) -> u64;
    #[deprecated = "use `get`"]
    async fn fetch(&self, key: String) -> u64;
}

#[hopline::service]
#[cfg(nobody_sets_this)]
pub trait Absent {
    async fn missing(&self, value: DoesNotExist);
}

#[hopline::service]
#[deprecated]
#[allow(non_camel_case_types)]
pub trait old_store {
    async fn get(&self) -> u64;
}

struct Memory;

impl Store for Memory {
    async fn get(&self, key: String) -> u64 {
        key.len() as u64
    }
    async fn present(&self) -> u64 {
        1
    }
    async fn other(&self) -> u64 {
        2
    }
    async fn fetch(&self, key: String) -> u64 {
        self.get(key).await
    }
}

#[allow(dead_code)]
fn calls(client: &Client) {
    let store = StoreClient::new(client);
    let _ = (store.get("a".into()), store.present(), store.other());
    #[expect(deprecated)]
    let _ = store.fetch("a".into());
}

fn main() {
    let _ = StoreServer::new(Memory);
}
