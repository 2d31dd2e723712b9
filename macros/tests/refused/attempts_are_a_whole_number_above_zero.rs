#[hopline::service]
trait Mail {
    #[rpc(oneway, attempts = 0)]
    async fn send(&self);
    #[rpc(oneway, attempts = "8")]
    async fn post(&self);
    #[rpc(oneway, attempts)]
    async fn write(&self);
}

fn main() {}
