#[hopline::service]
trait Demo {
    #[rpc(timeout = 2)]
    async fn put(&self);
    #[rpc(timeout)]
    async fn set(&self);
    #[rpc(timeout = 2s)]
    async fn get(&self);
}

fn main() {}
