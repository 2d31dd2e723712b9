//! Methods with a body: `return`, `?` and diverging ones included.
#![deny(warnings)]

use std::collections::HashMap;

#[hopline::service]
trait Library {
    async fn title(&self, id: u64) -> Option<String>;

    async fn shout(&self, id: u64) -> Option<String> {
        let title = self.title(id).await?;
        Some(title.to_uppercase())
    }
    async fn first(&self, ids: Vec<u64>) -> Result<String, String> {
        for id in ids {
            if let Some(title) = self.title(id).await {
                return Ok(title);
            }
        }
        Err("none of them".into())
    }
    async fn parse(&self, digits: String) -> Result<u64, String> {
        let id = digits.parse::<u64>().map_err(|error| error.to_string())?;
        Ok(id)
    }
    async fn counts(&self, words: Vec<String>) -> HashMap<String, usize> {
        words.into_iter().map(|word| (word, 1)).collect()
    }
    async fn boxed(&self, context: &hopline::Context) -> Box<[u8]> {
        let _ = context;
        Box::new([1, 2, 3])
    }
    async fn later(&self) -> u64 {
        // A body that never returns has the type of any result.
        panic!("nobody calls it")
    }
    #[rpc(oneway)]
    async fn forget(&self, id: u64) {
        if id == 0 {
            return;
        }
        self.title(id).await;
    }
    async fn nothing(&self) {}
}

struct Shelf;

impl Library for Shelf {
    async fn title(&self, id: u64) -> Option<String> {
        Some(id.to_string())
    }
    async fn later(&self) -> u64 {
        1
    }
}

fn main() {
    let _ = LibraryServer::new(Shelf);
}
