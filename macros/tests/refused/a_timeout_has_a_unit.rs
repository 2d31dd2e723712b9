#[hopline::service]
trait Demo {
    #[rpc(timeout = "2")]
    async fn put(&self);
    #[rpc(timeout = "1.5s")]
    async fn set(&self);
    #[rpc(timeout = "2 hours")]
    async fn get(&self);
}

fn main() {}
