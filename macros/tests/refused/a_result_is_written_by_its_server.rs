#[derive(Debug, serde::Deserialize)]
pub struct Item(u64);

#[hopline::service]
trait Store {
    async fn get(&self, id: u64) -> Item;
}

async fn calls(store: StoreClient) -> Result<Item, hopline::Error> {
    store.get(1).await
}

fn main() {}
