#[derive(Debug, serde::Serialize)]
pub struct Item(u64);

#[hopline::service]
trait Store {
    async fn put(&self, id: u64, item: Item);
}

fn main() {}
