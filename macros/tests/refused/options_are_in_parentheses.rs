#[hopline::service]
trait Demo {
    #[rpc]
    async fn put(&self);
    #[rpc = "oneway"]
    async fn set(&self);
    #[rpc()]
    async fn get(&self);
}

fn main() {}
